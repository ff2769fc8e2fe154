"""docs/architecture.md names files and functions that are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
HOP = re.compile(r"`([\w/]+\.py):([\w.]+)`")
FILE = re.compile(r"`([\w/]+(?:\.py|/))`")


def names_in(path: Path) -> set[str]:
    """Functions, classes, their methods and fields, and constants that a file defines."""
    found: set[str] = set()

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    walk(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def absent(text: str) -> list[str]:
    """What a page names that is not there."""
    package = ROOT / "megatron_vlm"
    wrong = [
        name for name in FILE.findall(text) if not any((at / name).exists() for at in (package, ROOT, *SUBFOLDERS))
    ]
    for file, name in HOP.findall(text):
        path = package / file
        if not path.is_file() or name not in names_in(path):
            wrong.append(f"{file}:{name}")
    return wrong


SUBFOLDERS = [ROOT / "megatron_vlm" / folder for folder in ("data", "models", "layers", "training")]
"""The table of rooms names files of a room by their place in it."""


def test_every_file_and_function_of_the_page_is_there():
    text = PAGE.read_text(encoding="utf-8")
    assert len(HOP.findall(text)) > 60
    assert not absent(text)


def test_every_room_is_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    rooms = sorted(path.parent.name for path in (ROOT / "megatron_vlm").glob("*/__init__.py"))
    assert not [room for room in rooms if f"| `{room}/`" not in text and f"`{room}/` |" not in text]


@pytest.mark.parametrize("text", ["`data/row.py:Rows`", "`data/rows.py`", "`data/row.py:Row.packed`", "`rooms/`"])
def test_what_is_absent_is_seen(text):
    assert absent(text)
