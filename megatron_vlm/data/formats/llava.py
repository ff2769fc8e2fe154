"""LLaVA's format: ``{"id", "image": str | [str], "conversations": [{"from": "human" | "gpt", "value": str}]}``.

``<image>`` in a value marks where an image goes; there must be as many as images. ``image`` may be absent (text only).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_vlm.data.formats.records import Record, check_turns, read_json_records
from megatron_vlm.data.sample import Turn
from megatron_vlm.errors import DataError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_llava(path: str | Path) -> Iterator[Record]:
    """Yields the records of a json or jsonl file.

    Raises:
        DataError: bad json (line and column), or a record that cannot be trained on; names file and record number.
    """
    for number, data in read_json_records(path):
        try:
            yield parse_llava(number, data)
        except DataError as error:
            raise DataError(error.message, shard=str(path), key=f"record {number}") from error


def parse_llava(number: int, data: Any) -> Record:
    """Turns one json value into a record.

    Raises:
        DataError: what is wrong with it.
    """
    if not isinstance(data, Mapping):
        raise DataError(f"a record is a json object, this is {type(data).__name__}")
    conversations = data.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise DataError("'conversations' must be a non-empty list")
    turns = []
    for index, item in enumerate(conversations):
        if (
            not isinstance(item, Mapping)
            or not isinstance(item.get("from"), str)
            or not isinstance(item.get("value"), str)
        ):
            raise DataError(f"conversations[{index}] must have the texts 'from' and 'value'")
        role = ROLES.get(item["from"].strip().lower())
        if role is None:
            raise DataError(f"conversations[{index}]: unknown role {item['from']!r} (known: {', '.join(ROLES)})")
        turns.append(Turn(role=role, text=item["value"]))
    images = data.get("image")
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise DataError("'image' must be a path or a list of paths")
    check_turns(turns, len(images))
    label = data.get("id")
    return Record(number=number, label="" if label is None else str(label), turns=tuple(turns), images=tuple(images))
