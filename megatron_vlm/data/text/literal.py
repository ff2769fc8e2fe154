"""Special tokens that the text of a record writes out: ``</s>`` in an answer is four characters, not the end of it.

    a turn's text --hidden--> special tokens in it as marks --template, pieces--> prompt --shown--> marks as text again,
                                                                   the template's own tokens as names that no text has
    the tokenizer --renamed--> the same, its special tokens under those names: ids and offsets are otherwise its own

    an answer that is given back, a system text --unmarked--> ``<image>`` and ``<video>`` in it as seven characters each

The meaning is that of transformers' ``split_special_tokens``, laid on the texts alone and not on the prompt around them. A text
without special tokens takes none of these steps. Marks and names are made of non-characters, which Unicode keeps for such uses.
"""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_vlm.data.sample import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from megatron_vlm.errors import DataError, Reason

CONTENT_TOKENS = frozenset(
    f"{open}{name}{close}"
    for name in ("ref", "box", "quad", "object_ref", "point", "polygon")
    for open, close in (("<", ">"), ("</", ">"), ("<|", "_start|>"), ("<|", "_end|>"))
)
"""Special tokens that a text writes on purpose: InternVL's and Qwen's marks of grounding, ``<box>`` and ``<|box_start|>``."""
RESERVED = re.compile("[\ufdd0-\ufdd3]")
_MARK = re.compile("\ufdd0([0-9]*)\ufdd1")
_NOTHING = "\ufdd0\ufdd1"


def specials_of(tokens: Iterable[str]) -> tuple[str, ...]:
    """Returns the special tokens that no text of a record may write: all but the placeholder and ``CONTENT_TOKENS``."""
    return tuple(token for token in tokens if token not in CONTENT_TOKENS and token != IMAGE_PLACEHOLDER)


def found(text: str, specials: Sequence[str]) -> list[str]:
    """Returns the special tokens that a text writes."""
    return [token for token in specials if token in text]


def hidden(text: str, specials: tuple[str, ...]) -> str:
    """Returns the text with each special token in it as a mark; it has none of ``RESERVED``."""
    if not found(text, specials):
        return text
    return _any_of(specials).sub(lambda match: f"\ufdd0{specials.index(match[0])}\ufdd1", text)


def unmarked(text: str) -> str:
    """Returns a text in which ``<image>`` and ``<video>`` mark no place: the tokenizer is given them as the text they are."""
    for mark in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER):
        text = text.replace(mark, f"{mark[0]}{_NOTHING}{mark[1:]}")
    return text


def check_whole(text: str, what: str) -> None:
    """Raises DataError for a text with half a character, which no file and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} has half a character (a lone surrogate) at {error.start}") from error


def check_text(text: str, what: str) -> None:
    """Raises DataError for a text that no tokenizer takes: half a character, or characters of ``RESERVED``."""
    check_whole(text, what)
    if match := RESERVED.search(text.replace(_NOTHING, "")):
        message = f"{what} has U+{ord(match[0]):04X}, which is no character (Unicode): leave it out"
        raise DataError(message, reason=Reason.CONTROL_TOKENS)


def hides(text: str) -> bool:
    """Whether a text has marks."""
    return "\ufdd0" in text


def shown(text: str, specials: tuple[str, ...]) -> str:
    """Returns a part of a prompt for the tokenizer of ``renamed``: its own special tokens by name, marks as text."""
    text = _any_of(specials).sub(lambda match: _name(specials.index(match[0])), text)
    return _MARK.sub(lambda match: specials[int(match[1])] if match[1] else "", text)


def renamed(tokenizer: str, specials: Sequence[str]) -> str:
    """Returns the JSON of a tokenizer whose special tokens have names that no text has, under their old ids."""
    data = json.loads(tokenizer)
    names = {token: _name(index) for index, token in enumerate(specials)}
    for token in data["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model: dict[str, Any] = data["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): index for token, index in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return json.dumps(data, ensure_ascii=False)


def _name(index: int) -> str:
    return f"\ufdd2{index}\ufdd3"


@functools.lru_cache(16)
def _any_of(specials: tuple[str, ...]) -> re.Pattern[str]:
    # The longest first, as the tokenizer matches.
    return re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))))
