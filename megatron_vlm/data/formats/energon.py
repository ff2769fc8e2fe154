"""Folders of Megatron-Energon: tars of a part (.nv-meta/split.yaml), and the fields that make a sample (dataset.yaml)."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_vlm.data.formats.splits import HELD_OUT, canonical
from megatron_vlm.errors import DataError
from megatron_vlm.yaml_values import plain, read_yaml

MAX_SHARDS = 1_000_000
CRUDE, CAPTION, VQA = "CrudeWebdataset", "CaptioningSample", "VQASample"
FIELDS = {  # sample classes that are conversations: fields that must be mapped
    CAPTION: ("image", "caption"),
    VQA: ("image", "context", "answers"),
    "OCRSample": ("image", "text"),
    CRUDE: (),
}
_DATASETS = {"CaptioningWebdataset": CAPTION, "VQAWebdataset": VQA, "OCRWebdataset": "OCRSample"}
"""Classes of data sets that name no class of samples beside them."""
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?|([A-Za-z])\.\.([A-Za-z])(?:\.\.-?\d+)?")
_DEPTH = 20  # of braces in braces
_LONGEST = 1000  # characters of a pattern


def read_energon(path: Path, part: str) -> tuple[str, dict[str, str], list[Path]]:
    """Returns the sample class, the field map and the tars of a part.

    Args:
        path: a folder with ``.nv-meta``.
        part: of its split; empty: train.

    Raises:
        DataError: metadata that cannot be used.
    """
    meta = path / ".nv-meta"
    dataset, split = _mapping(meta / "dataset.yaml"), _mapping(meta / "split.yaml")
    kind = dataset.get("sample_type", {}).get("__class__") if isinstance(dataset.get("sample_type"), dict) else None
    kind = kind or dataset.get("__class__") or ""
    kind = _DATASETS.get(kind, kind)
    where: dict[str, Any] = {"shard": str(meta / "dataset.yaml")}
    if dataset.get("sample_loader"):
        raise DataError("a sample_loader is code of the data set, which is not run: give a field_map", **where)
    if kind not in FIELDS:
        raise DataError(
            f"samples of class {kind!r} are not read (known: {', '.join((*FIELDS, *_DATASETS))}): build the data set from "
            "json, or write conversations into its tars and call it a CrudeWebdataset",
            **where,
        )
    fields = dataset.get("field_map") or {}
    if not isinstance(fields, dict) or not all(isinstance(v, str) for v in fields.values()):
        raise DataError("'field_map' must map fields to parts", **where)
    missing = [name for name in FIELDS[kind] if name not in fields]
    if missing:
        raise DataError(f"field_map lacks {', '.join(missing)} of {kind}", **where)
    where["shard"] = str(meta / "split.yaml")
    parts = split.get("split_parts")
    names = {canonical(name): name for name in map(str, parts)} if isinstance(parts, dict) else {}
    wanted = (
        part
        if part in names.values()
        else names.get("validation" if part == HELD_OUT else canonical(part or "train"), part)
    )
    if not isinstance(parts, dict) or wanted not in parts:
        raise DataError(
            f"no part {part or 'train'!r} in split_parts (known: {', '.join(names.values()) or 'none'}): set --split",
            **where,
        )
    excluded = set(map(str, split.get("exclude") or []))
    if any("/" in name and not name.endswith(".tar") for name in excluded):
        raise DataError("single samples under 'exclude' are not left out here: remove them from the shards", **where)
    tars = []
    for name in _shards(parts[wanted] or [], where):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"shard {name} leads out of the folder", **where)
        if name not in excluded:
            tars.append(path / name)
    if not tars:
        raise DataError(f"part {wanted!r} has no shards", **where)
    return kind, dict(fields), tars


def refuse_metadataset(path: Path) -> DataError:
    """What to say of a metadataset.yaml: a mixture of data sets, which a run's own configuration describes here."""
    found: list[str] = []
    _paths(_mapping(path), found)
    names = " ".join(found[:8]) + (" ..." if len(found) > 8 else "")
    return DataError(
        f"a metadataset of Energon is not one input here: build its data sets one by one ({names or 'it names none'}), and "
        "write their weights into the run's configuration, data.train: [{path: ..., weight: ...}, ...]",
        shard=str(path),
    )


def _paths(value: Any, found: list[str]) -> None:
    if isinstance(value, dict):
        if isinstance(value.get("path"), str) and value["path"] not in found:
            found.append(value["path"])
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        _paths(item, found)


def _shards(patterns: Any, where: dict[str, Any]) -> Iterator[str]:
    from braceexpand import braceexpand

    total = 0
    for pattern in map(str, patterns if isinstance(patterns, list) else [patterns]):
        total += count_braces(pattern)
        if total > MAX_SHARDS:
            raise DataError(f"{pattern[:80]!r} stands for more shards than {MAX_SHARDS:,}, the limit", **where)
        try:
            yield from braceexpand(pattern)
        except ValueError as error:
            raise DataError(f"{pattern[:80]!r}: {error}", **where) from error


def count_braces(pattern: str) -> int:
    """Counts the names that a pattern with braces stands for, without writing them out; at most a little above MAX_SHARDS.

    Raises:
        DataError: braces nested too deeply, or a pattern that is too long.
    """
    if len(pattern) > _LONGEST:
        raise DataError(f"{pattern[:80]!r} has {len(pattern)} characters, the limit is {_LONGEST}")
    groups = [[0, 1, -1]]  # of each open brace: names of its finished alternatives, of the one at hand, where it opened
    position = 0
    while position < len(pattern):
        char = pattern[position]
        if char == "\\":
            position += 1
        elif char == "{":
            groups.append([0, 1, position])
            if len(groups) > _DEPTH:
                raise DataError(f"{pattern[:80]!r}: braces nested more than {_DEPTH} deep")
        elif char == "," and len(groups) > 1:
            groups[-1][0] += groups[-1][1]
            groups[-1][1] = 1
        elif char == "}" and len(groups) > 1:
            done, here, start = groups.pop()
            inner = _RANGE.fullmatch(pattern, start + 1, position)
            number = done + here
            if inner and inner[1]:
                number = abs(int(inner[2]) - int(inner[1])) // max(1, abs(int(inner[3] or 1))) + 1
            elif inner:
                number = 64
            groups[-1][1] = min(groups[-1][1] * number, 10 * MAX_SHARDS)
        position += 1
    return max(1, *(done + here for done, here, _ in groups))


def _mapping(path: Path) -> dict[str, Any]:
    value = plain(read_yaml(path, DataError))
    if not isinstance(value, dict):
        raise DataError("must be a mapping", shard=str(path))
    return value
