"""Json records read with care and in bounded memory: a chunk of the file at a time, whatever its size."""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from megatron_vlm.data.file_kinds import what_it_is
from megatron_vlm.errors import DataError, Reason
from megatron_vlm.files import open_regular

MAX_RECORD_BYTES = 4 * 2**20
MAX_INLINE_BYTES = 64 * 2**20  # of a record that carries its images itself
CHUNK = 2**20
_bad = partial(DataError, reason=Reason.BAD_JSON)
JSON_LINES = (".jsonl", ".ndjson")
_SPACE = re.compile(r"[ \t\r\n]*")


def read_json_records(path: str | Path, max_bytes: int = MAX_RECORD_BYTES) -> Iterator[tuple[int, Any]]:
    """Yields (record number from 0, value) of a ``.jsonl`` file (a value a line) or a json array.

    A bad line of a ``.jsonl`` file comes as a DataError in place of its value. A bad array ends the file: what follows
    cannot be trusted.

    Raises:
        DataError: unreadable file, or a bad array: bad UTF-8, bad json (with line and column), duplicate keys, NaN,
            deep nesting, a record of more than ``max_bytes``.
    """
    path = Path(path)
    try:
        with open_regular(path, DataError) as file:
            if words := what_it_is(file.read(64)):
                raise _bad(f"it is {words}", shard=str(path))
            file.seek(0)
            if path.suffix.lower() in JSON_LINES:
                yield from _lines(file, max_bytes)
            else:
                yield from _Array(path, file, max_bytes).records()
    except OSError as error:
        raise _bad(f"cannot read the file: {error.strerror}", shard=str(path)) from error


def _lines(file: IO[bytes], max_bytes: int) -> Iterator[tuple[int, Any]]:
    decoder, number, line_number = strict_decoder(), 0, 0
    while raw := file.readline(max_bytes + 2):
        line_number += 1
        if len(raw) > max_bytes and not raw.endswith(b"\n"):
            yield number, _bad(f"the record has more than {max_bytes} bytes, the limit, line {line_number}")
            while (rest := file.readline(CHUNK)) and not rest.endswith(b"\n"):
                pass
            number += 1
            continue
        try:
            line = raw.decode("utf-8-sig" if line_number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            message = f"not UTF-8 text: {error.reason}, line {line_number} byte {error.start + 1}"
            yield number, _bad(message)
            number += 1
            continue
        if not line.strip():
            continue
        try:
            start = _after_space(line, 0)
            value, end = _decode(decoder, line, start, lambda index, n=line_number: f"line {n} column {index + 1}")
            end = _after_space(line, end)
            if end < len(line):
                raise _bad(f"bad json: text after the json value, line {line_number} column {end + 1}")
            yield number, value
        except DataError as error:
            yield number, error
        number += 1


class _Array:
    """A json array, decoded element by element from a window of text that moves over the file."""

    def __init__(self, path: Path, file: IO[bytes], max_bytes: int):
        self._path, self._file, self._max_bytes = path, file, max_bytes
        self._text, self._at, self._ended = "", 0, False
        self._line, self._column = 1, 0  # of the window's first character; columns count from 0 here
        self._pending = b""  # bytes of a character that the chunk cut
        self._read = 0

    def records(self) -> Iterator[tuple[int, Any]]:
        decoder, number = strict_decoder(), 0
        if self._skip() != "[":
            raise self._wrong("expected '[' (a list of records; name a file of one record a line .jsonl)")
        self._at += 1
        char = self._skip()
        while char != "]":
            key = f"record {number}"
            while True:
                try:
                    value, end = _decode(decoder, self._text, self._at, self._where)
                    if end < len(self._text) or not self._more():
                        break  # else the window may cut a number
                except DataError as error:
                    if len(self._text) - self._at > self._max_bytes:
                        message = f"the record has more than {self._max_bytes} bytes, the limit, or is bad json"
                        raise _bad(f"{message}: {error.message}", shard=str(self._path), key=key) from error
                    if not self._more():
                        raise error.at(shard=str(self._path), key=key) from error
            if end - self._at > self._max_bytes:
                message = f"the record has {end - self._at} characters, the limit is {self._max_bytes}"
                raise _bad(message, shard=str(self._path), key=key)
            self._at = end
            yield number, value
            number += 1
            char = self._skip()
            if char == ",":
                self._at += 1
                char = self._skip()
                if char == "]":
                    raise self._wrong("expected a record")
            elif char != "]":
                raise self._wrong("expected ',' or ']'")
        self._at += 1
        if self._skip():
            raise self._wrong("expected the end of the file")

    def _skip(self) -> str:
        """Moves over white space and returns the next character (empty at the end)."""
        while True:
            self._at = _after_space(self._text, self._at)
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _more(self) -> bool:
        """Drops what has been decoded and appends as much as is left, at least a chunk; False at the end."""
        if self._ended:
            return False
        done = self._text[: self._at]
        self._line += done.count("\n")
        self._column = len(done) - done.rfind("\n") - 1 if "\n" in done else self._column + len(done)
        left = self._text[self._at :]
        raw = self._file.read(max(CHUNK, len(left)))
        self._ended = not raw
        data = self._pending + raw
        try:
            text, self._pending = data.decode("utf-8"), b""
        except UnicodeDecodeError as error:
            if self._ended or error.start < len(data) - 3:
                position = self._read - len(self._pending) + error.start
                raise _bad(f"not UTF-8 text: {error.reason} at byte {position}", shard=str(self._path)) from error
            text, self._pending = data[: error.start].decode("utf-8"), data[error.start :]
        if not self._read:
            text = text.removeprefix("\ufeff")
        self._read += len(raw)
        self._text, self._at = left + text, 0
        return True

    def _where(self, index: int) -> str:
        before = self._text[:index]
        line = self._line + before.count("\n")
        column = index - before.rfind("\n") if "\n" in before else self._column + index + 1
        return f"line {line} column {column}"

    def _wrong(self, message: str) -> DataError:
        return _bad(f"bad json: {message} at {self._where(self._at)}", shard=str(self._path))


def _after_space(text: str, index: int) -> int:
    return _SPACE.match(text, index).end()  # type: ignore[union-attr]


def _decode(decoder: json.JSONDecoder, text: str, start: int, where: Any) -> tuple[Any, int]:
    try:
        return decoder.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise _bad(f"bad json: {error.msg}, {where(error.pos)}") from error
    except RecursionError as error:
        raise _bad(f"bad json: nested too deeply, {where(start)}") from error
    except ValueError as error:
        raise _bad(f"bad json: {error}, in the value that starts at {where(start)}") from error


def read_json(path: str | Path, max_bytes: int = MAX_INLINE_BYTES) -> Any:
    """Returns the one json value of a small file.

    Raises:
        DataError: unreadable, too long, bad UTF-8, bad json (with line and column), duplicate keys, NaN.
    """
    path = Path(path)
    try:
        with open_regular(path, DataError) as file:
            raw = file.read(max_bytes + 1)
        if words := what_it_is(raw[:64]):
            raise _bad(f"it is {words}", shard=str(path))
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise _bad(f"cannot read the file: {error.strerror}", shard=str(path)) from error
    except UnicodeDecodeError as error:
        raise _bad(f"not UTF-8 text: {error.reason} at byte {error.start}", shard=str(path)) from error
    if len(raw) > max_bytes:
        raise _bad(f"the file has more than {max_bytes} bytes, the limit", shard=str(path))

    def where(index: int) -> str:
        return f"line {text.count(chr(10), 0, index) + 1} column {index - text.rfind(chr(10), 0, index)}"

    try:
        start = _after_space(text, 0)
        value, end = _decode(strict_decoder(), text, start, where)
        end = _after_space(text, end)
        if end < len(text):
            raise _bad(f"bad json: text after the json value, {where(end)}")
    except DataError as error:
        raise error.at(shard=str(path)) from error
    return value


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
