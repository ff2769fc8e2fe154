"""LLaVA's format: ``{"id", "image": str | [str], "conversations": [{"from": "human" | "gpt", "value": str}]}``.

``<image>`` in a value marks where an image goes; there must be as many as images. ``image`` may be absent (text only).
``video`` and ``<video>`` go the same way. InternVL's records are the same.
"""

from collections.abc import Mapping
from typing import Any

from megatron_vlm.data.formats.keys import LOSS, loss_of, unknown_keys
from megatron_vlm.data.formats.records import Record, RecordSource, files_beside, object_of, record_of, role_of
from megatron_vlm.data.sample import Turn
from megatron_vlm.errors import DataError


def parse_llava(source: RecordSource, number: int, data: Any) -> Record:
    """Turns one json value into a record.

    Raises:
        DataError: what is wrong with it.
    """
    data = object_of(data)
    turns, unknown = turns_of(data)
    images, videos = files_beside(data)
    return record_of(source, number, data, turns, images, videos, read=["conversations"], unknown=unknown)


def turns_of(data: Mapping[str, Any]) -> tuple[list[Turn], list[str]]:
    """Returns the turns under ``conversations``, and their keys that nobody knows; raises DataError."""
    conversations = data.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise DataError("'conversations' must be a non-empty list")
    turns: list[Turn] = []
    unknown: list[str] = []
    for index, item in enumerate(conversations):
        where = f"conversations[{index}]"
        if not isinstance(item, Mapping) or not isinstance(item.get("value"), str) or "from" not in item:
            raise DataError(f"{where} must have the texts 'from' and 'value'")
        role = role_of(item["from"], where)
        turns.append(Turn(role=role, text=item["value"], loss=loss_of(item, role, where)))
        unknown += [f"conversations[].{key}" for key in unknown_keys(item, ("from", "value", *LOSS), where)]
    return turns, unknown
