"""InternVL's format: a meta.json of data sets, each with a jsonl of LLaVA's records.

    {"NAME": {"root": folder of the images, "annotation": FILE.jsonl, "data_augment": bool, "repeat_time": 1,
              "length": informational, "max_dynamic_patch": optional}}

``repeat_time`` below 1 takes that share of the data set, another one each epoch (InternVL's own code always takes the
first records); above 1 it may be fractional too.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_vlm.data.formats.json_file import read_json
from megatron_vlm.data.formats.records import RecordSource
from megatron_vlm.data.formats.xcomposer import located
from megatron_vlm.errors import DataError, nearest


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_KEYS: dict[str, tuple[bool, Callable[[Any], bool], str]] = {  # key -> required, test, what it must be
    "root": (True, lambda v: isinstance(v, str), "a folder"),
    "annotation": (True, lambda v: isinstance(v, str) and v.lower().endswith(".jsonl"), "a .jsonl file"),
    "data_augment": (True, lambda v: isinstance(v, bool), "true or false"),
    "repeat_time": (True, lambda v: _number(v) and v > 0, "a number above 0"),
    "length": (False, lambda v: isinstance(v, int) and v >= 0, "a whole number"),
    "max_dynamic_patch": (False, lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1,
                          "a whole number, at least 1"),
}  # fmt: skip


def expand_internvl(source: RecordSource) -> list[RecordSource]:
    """Returns the sources of a meta.json; a jsonl file is its own source.

    Raises:
        DataError: a wrong, missing or unknown key, by data set and name.
    """
    path = Path(source.path)
    if path.suffix.lower() == ".jsonl":
        return [source]
    if source.repeat is not None:
        raise DataError("--repeat: 'repeat_time' in meta.json says how often each data set is read", shard=str(path))
    meta = read_json(path)
    if not isinstance(meta, dict) or not meta:
        raise DataError(
            "meta.json must be an object of data sets: {NAME: {root, annotation, ...}}; --format llava reads a list of records",
            shard=str(path),
        )
    return [_data_set(source, path, name, entry) for name, entry in meta.items()]


def _data_set(source: RecordSource, path: Path, name: str, entry: Any) -> RecordSource:
    where: dict[str, Any] = {"shard": str(path), "key": f"data set {name!r}"}
    if not isinstance(entry, dict):
        raise DataError(f"must be an object, this is {type(entry).__name__}", **where)
    for key in entry:
        if key not in _KEYS:
            raise DataError(f"unknown key {key!r}{nearest(key, _KEYS)}; known: {', '.join(_KEYS)}", **where)
    for key, (required, test, wanted) in _KEYS.items():
        if key not in entry and required:
            raise DataError(f"the key {key!r} is missing: it must be {wanted}", **where)
        if key in entry and not test(entry[key]):
            raise DataError(f"{key!r} must be {wanted}, this is {entry[key]!r}", **where)
    try:
        annotation = located(entry["annotation"], path)
    except DataError as error:
        raise DataError(f"annotation {error.message}", **where) from error
    options = {key: entry[key] for key in ("max_dynamic_patch", "data_augment") if entry.get(key)}
    repeat = None if entry["repeat_time"] == 1 else float(entry["repeat_time"])
    root = str(Path(source.root) / entry["root"])
    return replace(source, path=annotation, name=name, root=root, repeat=repeat, options=options)
