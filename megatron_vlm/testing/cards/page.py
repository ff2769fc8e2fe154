"""A verification card as a page, and the digest of the code that it speaks of.

    outcomes --page--> Markdown, with digest_of(family) in it
    card --recorded--> the digest it was made at, to be compared with digest_of(family)

The digest is of the syntax trees of the definitions that the family's config, mapping, model and reference reach in
``models/families``, ``models/parts`` and ``layers``, name by name: comments, docstrings, a tower that another family uses, and
prompts and pixels, of which the card does not speak, change nothing.
"""

import ast
import functools
import hashlib
import importlib
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import megatron_vlm
from megatron_vlm import registry
from megatron_vlm.errors import ConfigError

CLAIMS = {
    "round-trip": "Hugging Face weights into Megatron's for tp 2, pp 2 and back",
    "logits": "logits of a packed row, fp32, against the reference one sample at a time",
    "gradients": "loss, and the gradient of every parameter, fp32, against the reference",
    "updates": "50 AdamW updates against a loop of the reference and torch.optim.AdamW",
    "layouts": "each layout against one process: first gradients, then 3 updates",
    "lora": "LoRA on the decoder: logits and gradients of every A and B against PEFT",
    "qlora": "the same over NF4 (double quantised) against PEFT on bitsandbytes",
    "generation": "greedy answers at tp 2, pp 2 against the reference, token by token",
}
SLOW = ("updates", "layouts", "qlora")
"""What ``--quick`` leaves out."""
OPEN = (
    "The published weights: nothing is fetched, the twins are tiny and random. `megatron-vlm convert verify` does it with them.",
    "Any GPU: kernels, NCCL, bf16 on a device, speed and memory.",
    "bf16 and fp16: all figures are of fp32.",
    "Prompts, labels and pixels against transformers' processor: `pytest {tests}/test_processor.py`.",
    "The other layouts (whole matrix, context parallelism, parameters in shards): `pytest -m full {tests}/test_layouts.py`.",
    "Video, other decoders of the family and other sizes: `pytest {tests}`.",
)
"""What no card verifies, and what does where something does."""
_PACKAGES = ("torch", "megatron-core", "transformers", "peft", "bitsandbytes")
_ROOMS = ("models.families", "models.parts", "layers")
_FILES = ("config", "mapping", "model", "reference")
_ROOT = Path(megatron_vlm.__file__).parent


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one claim: the bar, what was measured, and whether it holds; None: not verified, and ``measured`` says why."""

    bar: str
    measured: str
    passed: bool | None

    @property
    def verdict(self) -> str:
        """In words."""
        return {True: "holds", False: "**FAILS**", None: "**not verified**"}[self.passed]


def page(family: str, code: str, outcomes: Mapping[str, Outcome], seconds: float) -> str:
    """The card of a family whose digest was ``code``; claims without an outcome stand in it as not verified."""
    command = f"megatron-vlm verify-card {family}"
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    lines = [
        f"# Verification card: {family}",
        "",
        f"Made by `{command}` on its tiny twins, in {seconds:.0f} s on a CPU. What it is, and the measures: [cards](index.md).",
        "",
        "| | |",
        "| --- | --- |",
        f"| date | {time.strftime('%Y-%m-%d', time.gmtime())} |",
        f"| commit | {_commit()} |",
        f"| code | `{code}` |",
        f"| versions | megatron_vlm {megatron_vlm.__version__}, python {platform.python_version()}, {versions} |",
        "",
        "| claim | command | bar | measured | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, text in CLAIMS.items():
        outcome = outcomes.get(name, Outcome(bar="", measured="left out of this run", passed=None))
        cells = (text, f"`{command} --only {name}`", outcome.bar, outcome.measured, outcome.verdict)
        lines.append(f"| {' | '.join(cells)} |")
    folder = registry.FAMILIES[family].split(":")[0].rpartition(".")[2]
    lines += ["", "## Not verified by this card", ""]
    lines += [f"- {text.format(tests=f'tests/models/families/{folder}')}" for text in OPEN]
    return "\n".join(lines) + "\n"


def recorded(card: str) -> str:
    """The digest in a card; empty: there is none."""
    found = re.search(r"^\| code \| `(\w+)` \|$", card, re.MULTILINE)
    return found[1] if found else ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(absent)"


def _commit() -> str:
    git = ("git", "-C", str(_ROOT))
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "."], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "none: an installed package"
    return commit.stdout.strip() + (" with changes" if changes.stdout.strip() else "")


# ---- the digest ----


def digest_of(family: str) -> str:
    """Digest of the code that computes a family.

    Raises:
        ConfigError: no such family.
    """
    if family not in registry.FAMILIES:
        raise ConfigError(f"unknown model family {family!r}; known: {', '.join(registry.FAMILIES)}")
    package = registry.FAMILIES[family].split(":")[0].removeprefix("megatron_vlm.")
    folder = Path(importlib.import_module(f"megatron_vlm.{package}").__file__ or "").parent
    modules = [f"{package}.{name}" for name in _FILES if (folder / f"{name}.py").exists()]
    todo = [(module, name) for module in modules for name in _definitions(module)]
    found: dict[tuple[str, str], str] = {}
    while todo:
        place = todo.pop()
        if place not in found:
            found[place], uses = _definitions(place[0]).get(place[1], ("", ()))
            todo += [use for use in uses if use not in found]
    text = "\n".join(f"{module}:{name} {tree}" for (module, name), tree in sorted(found.items()) if tree)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _definitions(module: str) -> dict[str, tuple[str, tuple[tuple[str, str], ...]]]:
    """Name -> (its tree, what it uses as (module, name) in the rooms) of what stands at the top of a module."""
    path = _ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # docstrings, of attributes too, compute nothing
            kept = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    known: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_vlm."):
            base = (node.module or "").removeprefix("megatron_vlm.")
            for alias in node.names:
                known[alias.asname or alias.name] = (base, alias.name)
    own = {name: node for node in tree.body for name in _names(node)}
    known |= {name: (module, name) for name in own}
    found = {}
    for name, node in own.items():
        uses = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} & set(known)
        places = (_place(*known[use]) for use in sorted(uses) if known[use] != (module, name))
        found[name] = (ast.dump(node), tuple(place for places_of in places for place in places_of))
    return found


def _place(module: str, name: str) -> list[tuple[str, str]]:
    """A name that is used, where it is defined in the rooms; all of a module, where that is what is used."""
    if _is_module(f"{module}.{name}"):
        module = f"{module}.{name}"
        return [(module, each) for each in _definitions(module)] if _in_rooms(module) else []
    return [(module, name)] if _in_rooms(module) else []


def _is_module(module: str) -> bool:
    path = _ROOT.joinpath(*module.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def _in_rooms(module: str) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in _ROOMS)


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]
