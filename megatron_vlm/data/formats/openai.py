"""OpenAI's format: ``{"messages": [{"role", "content": str | [part]}]}`` with parts of text and images.

    {"type": "text", "text": ...}
    {"type": "image_url", "image_url": {"url": path or data URI}}     or {"type": "image", "image": path or data URI}

The text of a message is its parts in order, an image's place marked ``<image>``. System messages are kept. What cannot
be trained on here (tool calls, messages of weight 0, audio) is refused, not dropped.
"""

from collections.abc import Mapping
from typing import Any

from megatron_vlm.data.formats.records import (
    IMAGE_PLACEHOLDER,
    Record,
    Source,
    inline,
    list_of,
    make_record,
    object_of,
    role_of,
)
from megatron_vlm.data.sample import Turn
from megatron_vlm.errors import DataError


def parse_openai(source: Source, number: int, data: Any) -> Record:
    """Turns one json value into a record.

    Raises:
        DataError: what is wrong with it.
    """
    data = object_of(data)
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError("'messages' must be a non-empty list")
    turns, images = [], []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise DataError(f"{where} must be an object with 'role' and 'content'")
        if message.get("tool_calls") or message.get("function_call"):
            raise DataError(f"{where}: tool calls are not trained on here")
        if message.get("weight") not in (None, 1):
            raise DataError(f"{where}: weight {message['weight']!r}: only whole conversations are trained on here")
        role = "system" if message.get("role") == "developer" else role_of(message.get("role"), where)
        text, found = _content(message.get("content"), where)
        turns.append(Turn(role=role, text=text))
        images += found
    # Parts hold their images; plain text with placeholders has them beside the messages.
    beside = list_of(data, "image") + list_of(data, "images")
    if images and beside:
        raise DataError("images both in the messages and beside them")
    return make_record(source, number, data.get("id"), turns, images or beside)


def _content(content: Any, where: str) -> tuple[str, list[str | bytes]]:
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise DataError(f"{where}: 'content' must be a text or a list of parts, this is {type(content).__name__}")
    texts, images = [], []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        here = f"{where}.content[{number}]"
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise DataError(f"{here}: 'text' must be a text")
            texts.append(part["text"])
        elif kind in ("image_url", "image"):
            value = part.get(kind)
            value = value.get("url") if isinstance(value, Mapping) else value
            texts.append(IMAGE_PLACEHOLDER)
            if isinstance(value, str | bytes) and value:
                images.append(inline(value))
            elif value is not None or kind == "image_url":
                raise DataError(f"{here}: '{kind}' must be a path or a data URI")
        else:
            raise DataError(f"{here}: unknown type {kind!r} (known: text, image_url, image)")
    return "".join(texts), images
