"""Imports point one way, in no circle: read from the syntax trees, so those in functions and under TYPE_CHECKING count too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_vlm"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A module may import what is on its own level or below. The longest matching prefix decides.
LEVELS = {
    "": 0,  # the package's own __init__
    "errors": 0,
    "log": 0,
    "config": 0,
    "files": 0,
    "line_files": 0,
    "pages": 0,
    "digests": 0,
    "yaml_values": 0,
    "packages": 0,
    "processes": 0,
    "progress": 0,
    "data": 1,
    "layers": 1,
    "scoring": 1,
    "weights": 1,
    "parallel": 2,
    "models": 3,
    "registry": 3,  # imports a family only when asked for it
    "sources": 4,
    "peft": 5,
    "conversion": 6,
    "training": 7,
    "options": 8,
    "launch": 9,
    "serve": 10,
    "cli": 11,
    "__main__": 11,
    "testing": 12,
}
# Neighbours on one level that must stay apart all the same.
APART = {
    ("data", "layers"),
    ("layers", "data"),
    ("data", "weights"),
    ("weights", "data"),
    ("weights", "layers"),
    ("layers", "weights"),
}
NO_MEGATRON = (
    "data",
    "weights",
    "scoring",
    "errors",
    "log",
    "config",
    "files",
    "line_files",
    "pages",
    "packages",
    "digests",
    "yaml_values",
    "processes",
    "progress",
    "registry",
)
LATE_IMPORTS = 16
"""Fewer imports of our own package inside functions than this."""


def module_name(path: Path) -> str:
    """``data.types`` for megatron_vlm/data/types.py; packages lose their ``__init__``."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The entry of LEVELS that a module belongs to."""
    matches = [part for part in LEVELS if module == part or module.startswith(part + ".")]
    if not matches:
        raise AssertionError(f"megatron_vlm.{module} belongs to no part of the house: add it to LEVELS, or move it")
    return max(matches, key=len)


def imports_of(tree: ast.AST, module: str = "", is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Yields (line, absolute dotted name) of everything imported; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["megatron_vlm", *filter(None, module.split("."))]
                up = node.level - 1 if is_package else node.level
                base = ".".join([*here[: len(here) - up], *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def broken_rules(source: str, module: str, is_package: bool = False) -> list[str]:
    """Returns one line per import of ``source``, taken as ``megatron_vlm.<module>``, that breaks the order."""
    part, broken = part_of(module), []
    for line, name in imports_of(ast.parse(source), module, is_package):
        if name.startswith("megatron_vlm."):
            target = part_of(name.removeprefix("megatron_vlm.")) if known(name) else ""
            if LEVELS[target] > LEVELS[part]:
                broken.append(f"{module}:{line} ({part}) imports {name} ({target}), which lies above it")
            if (part, target) in APART:
                broken.append(f"{module}:{line} ({part}) imports {name} ({target}), its neighbour")
        elif name.split(".")[0] == "megatron":
            if any(module == part or module.startswith(part + ".") for part in NO_MEGATRON):
                broken.append(f"{module}:{line} imports {name}, but works without megatron-core")
            if ("parallel_state" in name or name.endswith(".mpu")) and module != "parallel.topology":
                broken.append(f"{module}:{line} imports {name}: only parallel/topology.py may")
    return broken


def known(name: str) -> bool:
    """Whether an imported name lies in a part of the house (``from megatron_vlm import __version__`` does not)."""
    rest = name.removeprefix("megatron_vlm.")
    return any(part and (rest == part or rest.startswith(part + ".")) for part in LEVELS) or (
        (PACKAGE / rest.split(".")[0]).exists() or (PACKAGE / f"{rest.split('.')[0]}.py").exists()
    )


def test_import_order():
    broken = []
    for path in MODULES:
        broken += broken_rules(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py")
    assert not broken, broken


def graph_of(sources: dict[str, str]) -> dict[str, set[str]]:
    """file -> files of the package that it imports anywhere, by their dotted names without ``megatron_vlm.``."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        is_package = any(other.startswith(module + ".") for other in sources)
        graph[module] = set()
        for _, name in imports_of(ast.parse(source), module, is_package):
            rest = name.removeprefix("megatron_vlm.") if name.startswith("megatron_vlm.") else ""
            target = rest if rest in sources else rest.rpartition(".")[0]  # a module, or a name out of one
            if target in sources and target != module:
                graph[module].add(target)
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that each reach all others of their group."""

    def reached(start: str) -> set[str]:
        found, open_ends = set(), [start]
        while open_ends:
            new = graph[open_ends.pop()] - found
            found |= new
            open_ends += new
        return found

    reach = {module: reached(module) for module in graph}
    groups = {frozenset(other for other in reach[m] if m in reach[other]) for m in graph if m in reach[m]}
    return sorted(sorted(group) for group in groups)


def test_no_circle_of_imports():
    found = circles(graph_of({module_name(path): path.read_text(encoding="utf-8") for path in MODULES}))
    assert not found, f"files that import each other, directly or through others: {found}"


def test_the_walk_sees_circles():
    inside = {
        "a.x": "from megatron_vlm.b import y",
        "b.y": "def f():\n    import megatron_vlm.c.z",
        "b": "",
        "c.z": "if TYPE_CHECKING:\n    from ..a.x import name\nfrom megatron_vlm.d import w",
        "d": "import ast",
    }
    assert circles(graph_of(inside)) == [["a.x", "b.y", "c.z"]]
    assert not circles(graph_of(inside | {"c.z": "from megatron_vlm.d import w"}))


def late_imports(source: str) -> list[tuple[int, str, bool]]:
    """(line, statement, whether a comment on it says why) of each import of our own package inside a function."""
    tree, lines, found = ast.parse(source), source.splitlines(), {}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    own = any(name.split(".")[0] == "megatron_vlm" for _, name in imports_of(node)) or getattr(
                        node, "level", 0
                    )
                    if own:
                        text = lines[node.lineno - 1 : node.end_lineno]
                        found[node.lineno] = (text[0].strip(), any(line.partition("#")[2].strip() for line in text))
    return [(line, *found[line]) for line in sorted(found)]


def test_imports_inside_functions_are_few_and_say_why():
    """They are there to save the loading of torch or megatron-core, never to get round a circle."""
    found = {module_name(path): late_imports(path.read_text(encoding="utf-8")) for path in MODULES}
    silent = [f"{m}:{line} {text}" for m, late in found.items() for line, text, told in late if not told]
    assert not silent, f"say on the line why it is not at the top, or move it there: {silent}"
    count = sum(len(late) for late in found.values())
    assert count < LATE_IMPORTS, {m: len(late) for m, late in found.items() if late}


def test_the_walk_sees_late_imports():
    source = (
        "from megatron_vlm.a import b\ndef f():\n    from megatron_vlm.c import (  # loads torch\n        d,\n    )\n"
        "    import os\n    def g():\n        from ..e import h\n"
    )
    assert [(line, told) for line, _, told in late_imports(source)] == [(3, True), (8, False)]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.order", "def f():\n    from megatron_vlm.training.trainer import Trainer"),
        ("data.order", "import megatron.core"),
        ("data.order", "from megatron_vlm.layers import norm"),
        ("models.vlm", "from megatron.core import parallel_state"),
        ("models.vlm", "from megatron.core import mpu"),
        ("models.vlm", "from megatron_vlm.conversion.convert import export_hf"),
        ("models.idefics2.model", "from ...cli import main"),
        ("training.step", "from megatron_vlm.testing import twins"),
        ("weights.mapping", "from megatron_vlm.conversion.open_source import open_source"),
        ("sources.hf", "from megatron_vlm.peft.merge import MergedSource"),
        ("peft.merge", "from megatron_vlm.conversion.open_source import open_source"),
    ],
)
def test_the_walk_sees_what_it_should(module, source):
    assert broken_rules(source, module)


def test_allowed_imports_pass():
    assert not broken_rules("from megatron_vlm.weights.mapping import direct\nimport megatron.core", "models.vlm")
    assert not broken_rules("from megatron_vlm import __version__", "data.order")


def test_megatron_is_patched_in_one_file():
    """Assignments to attributes of torch.cuda or of megatron modules, and setattr on them: parallel/cpu.py alone."""
    found = []
    for path in MODULES:
        if module_name(path) != "parallel.cpu":
            found += [f"{module_name(path)}:{line}" for line in patches(path.read_text(encoding="utf-8"))]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.cuda.current_device = int",
        "import megatron.core.utils as u\nu.get_device = 1",
        "from megatron.core import tensor_parallel\ntensor_parallel.random.f = 1",
        "import torch\nsetattr(torch.cuda, 'x', 1)",
    ],
)
def test_the_walk_sees_patches(source):
    assert patches(source)


def patches(source: str) -> list[int]:
    """Lines of ``source`` that assign to an attribute of torch.cuda or of something imported from megatron."""
    tree = ast.parse(source)
    owned = {"torch.cuda"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            owned |= {alias.asname or alias.name for alias in node.names if alias.name.split(".")[0] == "megatron"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
            owned |= {alias.asname or alias.name for alias in node.names}

    def is_owned(node: ast.AST) -> bool:
        text = ast.unparse(node)
        return any(text == name or text.startswith(name + ".") for name in owned)

    lines = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
            lines += [node.lineno for t in targets if isinstance(t, ast.Attribute) and is_owned(t.value)]
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr" and is_owned(node.args[0]):
            lines.append(node.lineno)
    return lines
