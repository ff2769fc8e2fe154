"""Kinds of problems with records and shards, by which reports count them."""

import re

# A kind of problem, by what its message says; the first that fits.
_KINDS = (
    ("duplicate id", r"^the id "),
    ("missing image", r"cannot read image|cannot read video|no such file"),
    ("damaged shard", r"^damaged|cut short|the (shard|tar) (is|has)|^not a tar|^tar member|manifest|the index"),
    ("bad json", r"^bad |not UTF-8|duplicate key|nested too deeply|text after the json"),
    ("placeholders", r"placeholder"),
    ("roles out of order", r"^roles|there is no user turn|unknown role"),
    ("empty answer", r"^empty answer"),
    ("nothing supervised", r"^nothing_supervised"),
    ("too long", r"^too_long"),
    ("unreadable image", r"^(image|frame|video) "),
    ("refused by the processor", r"^(control_tokens|max_image_num|too_many_patches|image_too_small)"),
)


def kind_of(message: str) -> str:
    """Returns what kind of problem a message speaks of, for counting."""
    return next((kind for kind, words in _KINDS if re.search(words, message)), "bad record")
