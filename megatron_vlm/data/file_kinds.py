"""What a file is that is not what its name, or the format that was given for it, says: told by its first bytes, so that a message
can say what to do.
"""

import json
import os
from pathlib import Path
from typing import Any

from megatron_vlm.errors import ConfigError, MegatronVLMError
from megatron_vlm.files import describe, open_regular

_MARKS = (
    (b"version https://git-lfs.github.com/", "a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first (gunzip)"),
    (b"BZh", "compressed with bzip2: unpack it first (bunzip2)"),
    (b"\xfd7zXZ\x00", "compressed with xz: unpack it first (unxz)"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first (unzstd)"),
    (b"PK\x03\x04", "a zip archive: unpack it first"),
    (b"<!doctype html", "a web page, as a download without access gives: download it again"),
    (b"<html", "a web page, as a download without access gives: download it again"),
)  # fmt: skip


def what_it_is(head: bytes) -> str:
    """Returns what a file with these first bytes (64 or more) is, and what to do; empty: nothing known."""
    head = head[:64].lower() if head[:1] == b"<" else head
    return next((words for mark, words in _MARKS if head.startswith(mark)), "")


_HEAD = 1 << 16
_FITS = {
    "llava": ("llava",),
    "xcomposer": ("llava",),
    "internvl": ("internvl", "llava"),
    "openai": ("openai",),
    "parquet": ("parquet",),
    "webdataset": ("webdataset",),
}
"""format -> what a file of it seems to be."""
_SEEMS = {
    "llava": "json records with 'conversations': --format llava, xcomposer or internvl reads them",
    "openai": "json records with 'messages': --format openai reads them",
    "internvl": "InternVL's meta.json: --format internvl reads it",
    "parquet": "a parquet file: --format parquet reads it",
    "webdataset": "a tar archive: --format webdataset reads it",
    "json": "json: --format llava reads records with 'conversations', --format openai those with 'messages'",
}


def other_format(path: str | Path, format: str) -> str:
    """What an input of a build or check seems to be, and what reads it; empty: the format that was given, or not known."""
    path = Path(path)
    if os.path.isdir(path):
        if format != "webdataset" and os.path.isfile(path / "manifest.json"):
            return "a folder of shards that `data build` made: train on it as it is, and check it without --format"
        kinds = {"parquet": ("*.parquet", "*.arrow"), "webdataset": ("*.tar",)}
        held = [kind for kind, names in kinds.items() if any(any(path.glob(name)) for name in names)]
        return "" if format in held or not held else f"a folder of files that --format {held[0]} reads"
    if path.suffix.lower() in (".yaml", ".yml", ".txt"):
        return ""
    kind = _kind_of(path)
    if not kind or kind in _FITS[format] or (kind == "json" and format not in ("parquet", "webdataset")):
        return ""
    return _SEEMS[kind]


def is_meta(value: Any) -> bool:
    """Whether content of a json file is InternVL's meta.json: each of its data sets is an object with an annotation."""
    return isinstance(value, dict) and all(
        isinstance(entry, dict) and "annotation" in entry for entry in value.values()
    )


def _kind_of(path: Path) -> str:
    try:
        with open_regular(path) as file:
            head = file.read(_HEAD)
    except (MegatronVLMError, OSError):  # whoever reads the file says so
        return ""
    if head.startswith((b"PAR1", b"ARROW1")):
        return "parquet"
    if head[257:262] == b"ustar":
        return "webdataset"
    text = head.decode("utf-8-sig", "ignore").lstrip()
    if text[:1] not in ("{", "["):
        return ""
    try:
        value, _ = json.JSONDecoder().raw_decode(text[1:].lstrip() if text[0] == "[" else text)
    except (ValueError, RecursionError):
        return "json"
    if not isinstance(value, dict):
        return "json"
    if text[0] == "{" and value and is_meta(value):
        return "internvl"
    found = [kind for kind, key in (("llava", "conversations"), ("openai", "messages")) if key in value]
    return found[0] if len(found) == 1 else "json"


def refuse_other_format(path: str | Path, format: str) -> None:
    """Raises ConfigError for an input that seems to be of another format than was given."""
    if words := other_format(path, format):
        raise ConfigError(f"--format {format} does not read {describe(path)}: it seems to be {words}")
