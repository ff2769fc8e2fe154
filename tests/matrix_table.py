"""The table of a whole matrix, in the form of docs/numerics.md, from what its checks print (``testing/layouts.py``).

``sh tests/run.sh --full`` ends with it; of outputs that were kept: ``python tests/matrix_table.py NAME=FILE ...``
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

_FIRST = re.compile(r"^\.?(?:(?P<twin>\w+)-)?tp\d+pp\d+dp\d+\S*: loss (?P<loss>\S+), worst gradient (?P<gradient>\S+)")
_LATER = re.compile(r"^\d+ updates: .* off (?P<loss>\S+); norm (?P<norm>\S+)$")
HEAD = (
    "| tests, twin | cases | loss before any update | first gradients | loss over the updates | norm over the updates |"
)


def table(outputs: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of the table, one for each name and twin with the worst of its cases, "-" where no case came so far; none where
    nothing was checked.

    Args:
        outputs: (name, what a test printed), any number of a name.
    """
    found: dict[str, list[list[float]]] = {}
    for name, output in outputs:
        where = name
        for line in output.splitlines():
            if match := _FIRST.match(line):
                where = ", ".join(filter(None, (name, match["twin"])))
                found.setdefault(where, []).append([float(match["loss"]), float(match["gradient"])])
            elif match := _LATER.match(line):
                found[where][-1] += [float(match["loss"]), float(match["norm"])]
    rows = []
    for where, cases in sorted(found.items()):
        columns = [[case[column] for case in cases if len(case) > column] for column in range(4)]
        worst = [f"{max(values):.1e}" if values else "-" for values in columns]
        short = len(cases) - len(columns[-1])
        rows.append(f"| {where} | {len(cases)}{f' ({short} cut short)' * bool(short)} | {' | '.join(worst)} |")
    return [HEAD, "|" + " --- |" * 6, *rows] if rows else []


if __name__ == "__main__":
    pairs = (argument.split("=", 1) for argument in sys.argv[1:])
    print("\n".join(table((name, Path(file).read_text()) for name, file in pairs)))
