"""InternLM-XComposer2's format: LLaVA's records with ``<ImageHere>``, and a list file that says how much of each.

# a comment
data/a json file.json 2.5        2.5 x 1000 samples of it an epoch, however many it has
"""

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_vlm.data.formats.llava import parse_llava
from megatron_vlm.data.formats.records import IMAGE_PLACEHOLDER, Record, RecordSource, object_of
from megatron_vlm.errors import DataError
from megatron_vlm.files import read_text

PLACEHOLDER = "<ImageHere>"


def parse_xcomposer(source: RecordSource, number: int, data: Any) -> Record:
    """Turns one json value into a record.

    Raises:
        DataError: what is wrong with it.
    """
    data = object_of(data)
    conversations = data.get("conversations")
    if isinstance(conversations, list):
        data = {**data, "conversations": [_renamed(index, item) for index, item in enumerate(conversations)]}
    history = data.get("history")
    if isinstance(history, list):
        data = {**data, "history": [_history(index, pair) for index, pair in enumerate(history)]}
    return parse_llava(source, number, data)


def _history(index: int, pair: Any) -> Any:
    if not isinstance(pair, list) or not all(isinstance(text, str) for text in pair):
        return pair
    return [_marked(f"history[{index}]", text) for text in pair]


def _renamed(index: int, item: Any) -> Any:
    if not isinstance(item, Mapping) or not isinstance(item.get("value"), str):
        return item  # parse_llava says what is wrong
    return {**item, "value": _marked(f"conversations[{index}]", item["value"])}


def _marked(where: str, text: str) -> str:
    if IMAGE_PLACEHOLDER in text:
        raise DataError(f"{where} has {IMAGE_PLACEHOLDER}: the placeholder of this format is {PLACEHOLDER}")
    return text.replace(PLACEHOLDER, IMAGE_PLACEHOLDER)


def expand_xcomposer(source: RecordSource) -> list[RecordSource]:
    """Returns the sources that a list file (``.txt``) names; a json file is its own source.

    Raises:
        DataError: a line that cannot be read, by number.
    """
    path = Path(source.path)
    if path.suffix.lower() != ".txt":
        return [source]
    if source.repeat is not None:
        raise DataError("--repeat: the list file itself says how much of each source an epoch takes", shard=str(path))
    lines = read_text(path, DataError).removeprefix("\ufeff").split("\n")
    sources = []
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if line and not line.startswith("#"):
            try:
                sources.append(_entry(source, path, line))
            except DataError as error:
                raise DataError(f"line {number}: {error.message}", shard=str(path)) from error
    if not sources:
        raise DataError("the list names no file: a line reads PATH K", shard=str(path))
    return sources


def _entry(source: RecordSource, path: Path, line: str) -> RecordSource:
    name, *number = line.rsplit(maxsplit=1)
    try:
        thousands = float(number[0])
    except (IndexError, ValueError) as error:
        raise DataError(f"expected PATH K (K x 1000 samples an epoch), found {line!r}") from error
    if not math.isfinite(thousands) or round(thousands * 1000) < 1:
        raise DataError(f"K must be at least 0.001 (one sample an epoch), found {number[0]}")
    return replace(source, path=located(name, path), per_epoch=round(thousands * 1000))


def located(name: str, beside: Path) -> str:
    """Returns a path that a list names: absolute, or from the list's own folder, or from the current one.

    Raises:
        DataError: it is in neither.
    """
    for candidate in (beside.parent / name, Path(name)):
        if os.path.exists(candidate):
            return str(candidate)
    raise DataError(f"{name} is neither in {beside.parent} nor in the current folder")
