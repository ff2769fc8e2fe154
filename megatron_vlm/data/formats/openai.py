"""OpenAI's format: ``{"messages": [{"role", "content": str | [part]}]}`` with parts of text and images.

    {"type": "text", "text": ...}
    {"type": "image_url", "image_url": {"url": path or data URI}}
    {"type": "image", "image" | "path" | "url": path or data URI, or "base64"}        and the same of videos

The text of a message is its parts in order, an image's place marked ``<image>``. System messages are kept; a message of weight 0
has no loss. What cannot be trained on here (tool calls, audio) is refused, not dropped.
"""

from collections.abc import Mapping
from typing import Any

from megatron_vlm.data.formats.keys import LOSS, loss_of, says_nothing, unknown_keys
from megatron_vlm.data.formats.records import (
    IMAGE_PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    Record,
    RecordSource,
    files_beside,
    from_base64,
    inline,
    object_of,
    record_of,
    role_of,
)
from megatron_vlm.data.sample import Turn
from megatron_vlm.errors import DataError


def parse_openai(source: RecordSource, number: int, data: Any) -> Record:
    """Turns one json value into a record.

    Raises:
        DataError: what is wrong with it.
    """
    data = object_of(data)
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError("'messages' must be a non-empty list")
    turns: list[Turn] = []
    unknown: list[str] = []
    files: dict[str, list[str | bytes]] = {IMAGE_PLACEHOLDER: [], VIDEO_PLACEHOLDER: []}
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise DataError(f"{where} must be an object with 'role' and 'content'")
        unknown += [f"messages[].{key}" for key in unknown_keys(message, ("role", "content", *LOSS), where)]
        role = "system" if message.get("role") == "developer" else role_of(message.get("role"), where)
        text = _content(message.get("content"), where, files)
        turns.append(Turn(role=role, text=text, loss=loss_of(message, role, where)))
    # Parts hold their images; plain text with placeholders has them beside the messages.
    beside, within = files_beside(data), list(files.values())
    if any(within) and any(beside):
        raise DataError("images both in the messages and beside them")
    images, videos = within if any(within) else beside
    return record_of(source, number, data, turns, images, videos, read=["messages"], unknown=unknown)


def _content(content: Any, where: str, files: dict[str, list[str | bytes]]) -> str:
    """Returns a message's text; its images and videos are added to those of their placeholder."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{where}: 'content' must be a text or a list of parts, this is {type(content).__name__}")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        here = f"{where}.content[{number}]"
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise DataError(f"{here}: 'text' must be a text")
            texts.append(part["text"])
        elif kind in ("image_url", "image", "video_url", "video"):
            mark = IMAGE_PLACEHOLDER if kind.startswith("image") else VIDEO_PLACEHOLDER
            texts.append(mark)
            files[mark] += _file(part, kind, here)
        else:
            raise DataError(f"{here}: unknown type {kind!r} (known: text, image_url, image, video_url, video)")
    return "".join(texts)


def _file(part: Mapping[str, Any], kind: str, here: str) -> list[str | bytes]:
    """The image of a part: under its own name, or as transformers' templates have it; none: it stands beside the messages."""
    names = (kind, "path", "url", "base64", "bytes")
    found = [(name, part[name]) for name in names if not says_nothing(part.get(name))]
    if len(found) > 1:
        raise DataError(f"{here}: the image stands under {' and '.join(name for name, _ in found)}: keep one")
    if not found and not kind.endswith("_url"):
        return []
    name, value = found[0] if found else (kind, None)
    if isinstance(value, Mapping):
        name, value = next(((n, value[n]) for n in ("url", "path", "bytes") if value.get(n)), (name, None))
    if name in ("base64", "bytes") and isinstance(value, str):
        return [from_base64(value, f"{here}: '{name}'")]
    if not isinstance(value, str | bytes):
        raise DataError(f"{here}: '{kind}' must be a path or a data URI")
    return [inline(value)]
