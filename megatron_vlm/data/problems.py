"""Records that a build or a check cannot use: told in a message, and kept as lines of ``rejected.jsonl``."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vlm.errors import Reason

REJECTED = "rejected.jsonl"
SHOWN = 50  # problems that an error lists


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A record that cannot be used; ``record`` is -1 where the rest of a file is lost, ``key`` that of a tar's sample.

    ``reason`` is the number of a Reason: problems are kept as json.
    """

    source: int
    record: int
    file: str
    message: str
    key: str = ""
    reason: int = Reason.BAD_RECORD.number

    def __str__(self) -> str:
        where = f", record {self.record}" if self.record >= 0 else ""
        return f"{self.file}{where}{f', sample {self.key}' if self.key else ''}: {self.message}"


def describe(
    problems: Sequence[Problem], total: int, fatal: bool, *, allowed: float | None = None, hint: str = ""
) -> str:
    """Returns the text of an error: each problem, and a count by kind.

    Args:
        problems: all of them.
        total: records, these included.
        fatal: the rest of a file is lost.
        allowed: share of records that may be left out; None: none may.
        hint: the usual cause, where there is a sign of it.
    """
    kinds = Counter(Reason.numbered(problem.reason).words for problem in problems)
    shown = "\n".join(f"  {problem}" for problem in problems[:SHOWN])
    more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    counts = "\n".join(f"  {number:8d}  {kind}" for kind, number in kinds.most_common())
    advice = "correct the file: what follows a fault like this cannot be read" if fatal else (
        f"correct them, or set --on-bad-sample skip to leave them out and list them in {REJECTED}"
    )  # fmt: skip
    if not fatal and allowed is not None:
        share = f"{len(problems) / max(1, total):.1%} of the records cannot be used, and {allowed:.1%} may be left out"
        advice = f"{share} (--max-bad-fraction, data.max_bad_fraction): correct them, or allow more"
    cause = f"\n{hint}" if hint else ""
    return f"{len(problems)} problems in {total} records:\n{shown}{more}\nby kind:\n{counts}{cause}\n{advice}"


def rejected_line(problem: Problem) -> str:
    """The line of ``rejected.jsonl`` about a record."""
    where = {"file": problem.file, "record": problem.record, "key": problem.key, "reason": problem.message}
    return json.dumps({name: value for name, value in where.items() if name != "key" or value})
