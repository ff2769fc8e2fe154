"""What ``convert verify`` found: tables of modules, and the verdict."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Row:
    """One line of a table."""

    module: str
    cells: tuple[str, ...]
    passed: bool


@dataclass
class Report:
    """Outcome of ``verify``: whether all passed, the level that ran, how equal the weights are, and the printed lines."""

    level: str
    passed: bool = True
    weights: str = ""
    lines: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        """Prints and keeps a line."""
        print(line, flush=True)
        self.lines.append(line)

    def table(self, title: str, header: tuple[str, ...], rows: Iterable[Row]) -> None:
        """Prints a table; a row that did not pass makes the whole fail."""
        rows = list(rows)
        width = max([len(row.module) for row in rows] + [len(title)])
        columns = [max([len(row.cells[i]) for row in rows] + [len(name)]) for i, name in enumerate(header)]
        self.say("")
        self.say(f"{title:<{width}}  " + "  ".join(f"{name:>{w}}" for name, w in zip(header, columns)))
        for row in rows:
            cells = "  ".join(f"{cell:>{w}}" for cell, w in zip(row.cells, columns))
            self.say(f"{row.module:<{width}}  {cells}  {'ok' if row.passed else 'DIFFERS'}")
        self.passed &= all(row.passed for row in rows)


def module_of(name: str) -> str:
    """The layer, or the part outside layers, that a tensor belongs to."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1]) if len(parts) > 2 else name
