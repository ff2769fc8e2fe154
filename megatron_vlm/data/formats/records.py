"""What the formats share: json records read with care, and the checks every conversation must pass."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_vlm.data.sample import Turn
from megatron_vlm.errors import DataError

IMAGE_PLACEHOLDER = "<image>"
MAX_RECORD_CHARS = 4 * 2**20
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record of a source file: ``images`` are paths as written; ``label`` is its ``id``, unique or not."""

    number: int
    label: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]


def check_turns(turns: Sequence[Turn], num_images: int) -> None:
    """Checks roles, answers and placeholders: [system] (user assistant)+ with an ``<image>`` per image.

    Raises:
        DataError: what is wrong, with the numbers.
    """
    body = turns[1:] if turns and turns[0].role == "system" else turns
    for index, turn in enumerate(body):
        wanted = ("user", "assistant")[index % 2]
        if turn.role != wanted:
            roles = ", ".join(t.role for t in turns)
            raise DataError(f"roles out of order: expected {wanted} and found {turn.role} (turns: {roles})")
        if turn.role == "assistant" and not turn.text.strip():
            raise DataError(f"empty answer in turn {index + len(turns) - len(body)}")
    if len(body) % 2 or not body:
        raise DataError("roles out of order: the last user turn has no answer" if body else "there is no user turn")
    found = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if found != num_images:
        raise DataError(
            f"{found} {IMAGE_PLACEHOLDER} placeholders for {num_images} images: write one per image, in its place"
        )


def read_json_records(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yields (record number from 0, value) of a ``.jsonl`` file (a value a line) or a json array.

    Raises:
        DataError: unreadable file, bad UTF-8, bad json (with line and column), duplicate keys, NaN, deep nesting.
    """
    path = Path(path)
    try:
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            with path.open("rb") as file:
                yield from _lines(path, file)
        else:
            yield from _array(path, path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"cannot read the file: {error.strerror}", shard=str(path)) from error
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text: {error.reason} at byte {error.start}", shard=str(path)) from error


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    decoder, number = strict_decoder(), 0
    for line_number, raw in enumerate(file, 1):
        line = raw.decode("utf-8-sig" if line_number == 1 else "utf-8")
        if line.strip():
            start = _SPACE.match(line).end()  # type: ignore[union-attr]
            value, end = _decode(decoder, line, start, path, number, line_number)
            if line[end:].strip():
                raise DataError(f"text after the json value, line {line_number} column {end + 1}", shard=str(path))
            yield number, value
            number += 1


def _array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Decodes an array element by element: a gigabyte of records is never held as objects."""
    decoder = strict_decoder()

    def skip(index: int) -> tuple[int, str]:
        index = _SPACE.match(text, index).end()  # type: ignore[union-attr]
        return index, text[index : index + 1]

    def wrong(index: int, wanted: str) -> DataError:
        line = text.count("\n", 0, index) + 1
        column = index - text.rfind("\n", 0, index)
        return DataError(f"bad json: expected {wanted} at line {line} column {column}", shard=str(path))

    index, char = skip(0)
    if char != "[":
        raise wrong(index, "'[' (a list of records; name a file of one record a line .jsonl)")
    index, char = skip(index + 1)
    number = 0
    while char != "]":
        value, index = _decode(decoder, text, index, path, number)
        yield number, value
        number += 1
        index, char = skip(index)
        if char == ",":
            index, char = skip(index + 1)
            if char == "]":
                raise wrong(index, "a record")
        elif char != "]":
            raise wrong(index, "',' or ']'")
    index, char = skip(index + 1)
    if char:
        raise wrong(index, "the end of the file")


def _decode(
    decoder: json.JSONDecoder, text: str, start: int, path: Path, number: int, line_number: int = 0
) -> tuple[Any, int]:
    key = f"record {number}"
    try:
        value, end = decoder.raw_decode(text, start)
    except json.JSONDecodeError as error:
        line = line_number or error.lineno
        raise DataError(f"bad json: {error.msg}, line {line} column {error.colno}", shard=str(path), key=key) from error
    except RecursionError as error:
        raise DataError("json nested too deeply", shard=str(path), key=key) from error
    except ValueError as error:
        raise DataError(f"bad json: {error}", shard=str(path), key=key) from error
    if end - start > MAX_RECORD_CHARS:
        message = f"the record has {end - start} characters, the limit is {MAX_RECORD_CHARS}"
        raise DataError(message, shard=str(path), key=key)
    return value, end


def strict_decoder() -> json.JSONDecoder:
    """A json decoder that refuses duplicate keys and NaN, which json readers disagree on (as ``ValueError``)."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(items)
        if len(data) != len(items):
            names = [name for name, _ in items]
            raise ValueError(f"duplicate key {next(n for n in names if names.count(n) > 1)!r}")
        return data

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not a number in json")

    return json.JSONDecoder(object_pairs_hook=pairs, parse_constant=constant)
