"""The packaged recipes: every YAML file of examples/, by name; and which of them is a family's default.

examples/internvl3/lora_internvl3.yaml  <->  "internvl3/lora_internvl3"
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from megatron_vlm.config import load_yaml
from megatron_vlm.errors import ConfigError, nearest
from megatron_vlm.files import expand_path, writing
from megatron_vlm.options import xtuner
from megatron_vlm.registry import FamilySpec

_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """``name``; its sections; ``batch``: {"global": rows} or {"accumulation": times}, where nobody says another."""

    name: str
    settings: dict[str, Any]
    batch: dict[str, int]


def root() -> Path:
    """The folder of recipes: beside the package in a checkout, inside it in an installed wheel.

    Raises:
        ConfigError: there is none.
    """
    for folder in (_PACKAGE / "examples", _PACKAGE.parent / "examples"):
        if any(folder.rglob("*.yaml")):
            return folder
    raise ConfigError(
        f"no recipes found beside {_PACKAGE}: this installation lacks its examples; install the wheel again"
    )


def names(pattern: str | None = None) -> list[str]:
    """All names in order; ``pattern``: only those that contain it, or match it as a shell pattern, XTuner's names among them."""
    folder = root()
    found = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    if pattern is None:
        return found
    return [
        name
        for name in (*found, *xtuner.NAMES)
        if pattern.lower() in name.lower() or fnmatch(name.lower(), pattern.lower())
    ]


def path_of(name: str) -> Path:
    """The file of a recipe, by its name or the last part of it.

    Raises:
        ConfigError: unknown or ambiguous name.
    """
    known = names()
    wanted = xtuner.NAMES.get(name, name).removesuffix(".yaml")
    found = [wanted] if wanted in known else [other for other in known if other.rpartition("/")[2] == wanted]
    if len(found) > 1:
        raise ConfigError(f"recipe {name!r} is one of {', '.join(found)}: give the whole name")
    if not found:
        raise ConfigError(
            f"unknown recipe {name!r}{nearest(wanted, [*known, *xtuner.NAMES])}; `megatron-vlm recipe list` shows all"
        )
    return root() / f"{found[0]}.yaml"


def title_of(name: str) -> str:
    """What a recipe is for: the comment that it starts with, up to its first full stop or colon."""
    words = []
    for line in path_of(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words.append(line.lstrip("# ").strip())
    text = " ".join(words)
    end = min((place for mark in (". ", ": ", "; ") if (place := text.find(mark)) >= 0), default=len(text))
    return text[:end].rstrip(".")


def copy(name: str, directory: str | Path) -> Path:
    """Copies a recipe's file into a folder, which is made, or writes a config in XTuner's form; returns where it lies.

    Raises:
        ConfigError: the file is there already, or cannot be written.
    """
    if name in xtuner.NAMES:
        return xtuner.copy(name, directory)
    source = path_of(name)
    target = Path(directory, source.name)
    if target.exists():
        raise ConfigError(f"{target} exists already: name another folder, or remove it")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return target


def load_config(config: str) -> dict[str, Any]:
    """Reads what ``--config`` names: a file, the ``config.yaml`` of a run's folder, or a packaged recipe.

    Raises:
        ConfigError: it is none of them.
    """
    path = expand_path(config, "--config")
    if path.is_dir() and (path / "config.yaml").is_file():
        path /= "config.yaml"
    return load_yaml(path if path.exists() or path.suffix else path_of(config))


def defaults_of(spec: FamilySpec, hf_config: Mapping[str, Any], kind: Literal["full", "lora", "qlora"]) -> Recipe:
    """The recipe whose settings hold where a command of an original program names none."""
    of_family = spec.recipes(hf_config)
    name = getattr(of_family, kind)
    settings = load_yaml(path_of(name))
    # The batch is the published one, in units that fit the ranks; what lies in a row, as the original program's flags say.
    batch = {"global": settings["training"].pop("global_batch_size")}
    if of_family.accumulation:
        batch = {"accumulation": of_family.accumulation}
    settings["training"].pop("micro_batch_size", None)
    settings["data"].pop("group_by", None)
    if kind == "lora":
        # QLoRA's recipe serves LoRA on whole weights too: the same settings without 4 bits.
        for key in ("quantize", "double_quant", "quantize_groups"):
            settings["peft"].pop(key, None)
    elif kind == "qlora":
        settings["peft"].setdefault("quantize", "nf4")
    return Recipe(name=name, settings=settings, batch=batch)
