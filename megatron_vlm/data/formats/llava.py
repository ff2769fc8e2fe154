"""LLaVA's format: ``{"id", "image": str | [str], "conversations": [{"from": "human" | "gpt", "value": str}]}``.

``<image>`` in a value marks where an image goes; there must be as many as images. ``image`` may be absent (text only).
``video`` and ``<video>`` go the same way. InternVL's records are the same.
"""

from collections.abc import Mapping
from typing import Any

from megatron_vlm.data.formats.records import Record, Source, list_of, make_record, object_of, role_of
from megatron_vlm.data.sample import Turn
from megatron_vlm.errors import DataError


def parse_llava(source: Source, number: int, data: Any) -> Record:
    """Turns one json value into a record.

    Raises:
        DataError: what is wrong with it.
    """
    data = object_of(data)
    turns = turns_of(data)
    images = list_of(data, "image") + list_of(data, "images")
    videos = list_of(data, "video") + list_of(data, "videos")
    if any(isinstance(video, bytes) for video in videos):
        raise DataError("'video' must be a path or a list of paths")
    return make_record(source, number, data.get("id"), turns, images, videos)


def turns_of(data: Mapping[str, Any]) -> list[Turn]:
    """Returns the turns under ``conversations``; raises DataError."""
    conversations = data.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise DataError("'conversations' must be a non-empty list")
    turns = []
    for index, item in enumerate(conversations):
        if not isinstance(item, Mapping) or not isinstance(item.get("value"), str) or "from" not in item:
            raise DataError(f"conversations[{index}] must have the texts 'from' and 'value'")
        turns.append(Turn(role=role_of(item["from"], f"conversations[{index}]"), text=item["value"]))
    return turns
