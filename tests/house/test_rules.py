"""The rules of the house that a machine can check: sizes, docstrings, and what must not stand in the code."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("megatron_vlm", "examples", "benchmarks", "toolkits", "docker", "docs", "tests", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
) + [ROOT / name for name in ("setup.py", "README.md", "CHANGELOG.md", "pyproject.toml")]
CODE = [path for path in SOURCES if path.suffix == ".py"]
PACKAGE = [path for path in CODE if (ROOT / "megatron_vlm") in path.parents]

MAX_FILE_LINES = 400
MAX_TEST_LINES = 420
MAX_FUNCTION_LINES = 95

# Spelled in two halves, so that this file may name them.
FORBIDDEN = {
    "trust_remote" + "_code=True": "code from a model directory is never run",
    "import pick" + "le": "checkpoints and data travel as safetensors, tar and JSON",
    "TO" + "DO": "finish it, or file an issue",
    "FIX" + "ME": "finish it, or file an issue",
    "torch.lo" + "ad(": "a pickle reader; weights are read with safetensors",
}
# The one reader of files that torch saved, which builds tensors and plain values alone.
WEIGHTS_ONLY_READER = ROOT / "megatron_vlm" / "weights" / "torch_files.py"
REGISTRY_HOST = re.compile(r"pypi\.org|pythonhosted|download\.pytorch\.org|conda\.anaconda|registry\.npmjs", re.I)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    """Content of a source file; empty for a picture."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def test_sizes():
    wrong = []
    for path in CODE:
        text = text_of(path)
        most = MAX_FILE_LINES if path in PACKAGE else MAX_TEST_LINES
        if (lines := text.count("\n")) > most:
            wrong.append(f"{name(path)} has {lines} lines, at most {most}: split it")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                if size > MAX_FUNCTION_LINES:
                    wrong.append(f"{name(path)}: {node.name}: {size} lines, at most {MAX_FUNCTION_LINES}")
    assert not wrong, wrong


def test_docstrings():
    """Every module, public class and public function of a module says what it is for."""
    wrong = []
    for path in PACKAGE:
        if not text_of(path).strip():
            continue
        tree = ast.parse(text_of(path))
        public = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and not n.name.startswith("_")]
        wrong += [f"{name(path)}: {n.name} has no docstring" for n in public if not ast.get_docstring(n)]
        wrong += [] if ast.get_docstring(tree) else [f"{name(path)} has no docstring"]
    assert not wrong, wrong


def test_forbidden_text():
    wrong = []
    for path in SOURCES:
        text = text_of(path)
        for word, reason in FORBIDDEN.items():
            if "pickle" in word and ("testing" in path.parts or "tests" in path.parts):
                continue  # the pool of test ranks speaks to itself
            if path == WEIGHTS_ONLY_READER:
                text = re.sub(r"torch\.load\([^()]*weights_only=True[^()]*\)", "", text)
            if re.search(rf"(?<![A-Za-z]){re.escape(word)}", text):
                wrong.append(f"{name(path)}: {word!r}: {reason}")
        if path != Path(__file__) and REGISTRY_HOST.search(text):
            wrong.append(f"{name(path)} names a package registry's host")
    assert not wrong, wrong


def test_families_are_named_in_their_folders_alone():
    """A family is one folder and one line of the registry: what depends on one is asked of its FamilySpec."""
    (registry,) = (path for path in PACKAGE if path.name == "registry.py")
    table = text_of(registry).split("\nFAMILIES = ")[1].split("}")[0]
    folders = {module.split(".")[-1] for module in re.findall(r'"([\w.]+):', table)}
    names = set(re.findall(r'^ +"(\w+)":', table, re.M))
    assert len(names) >= 6 and len(folders) >= 5
    quoted, wrong = re.compile(rf"""["']({"|".join(sorted(names))})["']"""), []
    for path in PACKAGE:
        if path != registry and not folders & set(path.parts) and "testing" not in path.parts:
            wrong += [f"{name(path)}: {found}" for found in quoted.findall(text_of(path))]
    assert not wrong, wrong


def test_argparse_stays_in_the_command_line():
    users = [name(p) for p in PACKAGE if re.search(r"^\s*(import|from) argparse", text_of(p), re.M)]
    assert all(user.startswith("megatron_vlm/cli/") for user in users), users


def test_tests_mirror_the_source():
    """tests/<folder> is a folder of the package, or one of those that test what lies outside it; tests/ holds its files' own."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(ROOT / "tests")
        if not folder.parts:
            module = path.name.removeprefix("test_")
            assert (ROOT / "megatron_vlm" / module).is_file(), f"{name(path)}: no megatron_vlm/{module}"
            continue
        outside = ("golden", "house", "examples", "benchmarks", "toolkits")
        assert folder.parts[0] in outside or (ROOT / "megatron_vlm" / folder).is_dir(), f"no megatron_vlm/{folder}"


def test_no_test_skips_itself():
    """A test that skips when an import of ours fails hides exactly what it is for."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        hiding = re.search(r"importorskip|mark\.skip|pytest\.skip|mark\.xfail|mock", text_of(path))
        assert path == Path(__file__) or not hiding, f"{name(path)}: {hiding and hiding.group()}"


def test_few_parameters_where_a_model_goes_in_and_out():
    """Saving and loading take a Model: what it is made of is not handed on piece by piece."""
    wrong = []
    for path in PACKAGE:
        if path.parent.name != "checkpoint" and path.name not in ("load.py", "lora.py"):
            continue
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                taken = [one.arg for one in (*node.args.args, *node.args.kwonlyargs) if one.arg not in ("self", "cls")]
                count = len(taken)
                if count > 5:
                    wrong.append(f"{name(path)}: {node.name} takes {count} parameters, at most 5")
    assert not wrong, wrong


def test_ranks_are_reckoned_in_one_file():
    """What a rank's number, or a number of ranks, means is parallel/grid.py's: nobody else divides by sizes of the layout."""
    reckoning = re.compile(
        r"\b(world|world_size|get_rank\(\)|topology\.rank)\s*(//|%)|\b(tp|cp|dp|pp) \* (tp|cp|dp|pp)\b"
    )
    wrong = []
    for path in PACKAGE:
        if path.name != "grid.py":
            for number, line in enumerate(text_of(path).splitlines(), 1):
                if reckoning.search(line.split("  #")[0]) and '"""' not in line:
                    wrong.append(f"{name(path)}:{number}: {line.strip()}")
    assert not wrong, wrong
