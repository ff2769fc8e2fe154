"""Tar headers: read fast and with suspicion. Only regular members, whole, with plain names.

    file --walk: a jump from header to header--> offsets --numpy: checksums and types of all at once--> TarIndex

Archives whose pax or GNU extension headers say more than times (long names) get their names from ``tarfile``; their places are
checked all the same.
"""

import io
import mmap
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.file_kinds import what_it_is
from megatron_vlm.errors import DataError, Reason
from megatron_vlm.files import open_regular

BLOCK = 512
_damaged = partial(DataError, reason=Reason.DAMAGED_SHARD)
MAX_MEMBER = 2**30
MAX_EXTENSION = 2**20  # of a pax or GNU header
_REGULAR = (0, ord("0"))
_FOLDER = ord("5")
_PAX = ord("x")
_EXTENSIONS = tuple(map(ord, "xgLK"))
_TIMES = (b"mtime", b"atime", b"ctime")
_CHUNK = 2048  # headers checked at a time: a megabyte, so that it stays in the cache
_WORDS = BLOCK // 8
_LOW_BYTES = np.uint64(0x00FF00FF00FF00FF)
_OCTAL = 8 ** np.arange(10, -1, -1)


@dataclass(frozen=True, kw_only=True)
class TarIndex:
    """Regular members of an archive, in order.

    Attributes:
        starts: int64 [N], of a member's first header (an extension header, if it has one).
        offsets: int64 [N], of its content.
        sizes: int64 [N], of its content.
        groups: int64 [samples], the first member of each run of members that share a webdataset key: the name up to
            the first dot after the last slash.
        end: where the last member's padding ends.
        raw_names: the names as stored, each ended by a NUL.
    """

    starts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    groups: NDArray[np.int64]
    end: int
    raw_names: bytes

    def names(self) -> list[str]:
        """Returns the names of all members.

        Raises:
            DataError: one that is not UTF-8, or leads out of the archive.
        """
        raw = self.raw_names
        if not (b".." in raw or raw.startswith(b"/") or b"\0/" in raw):
            try:
                return raw.decode().split("\0")[:-1]
            except UnicodeDecodeError:
                pass  # told by name below
        return [_plain_name(name) for name in raw.split(b"\0")[:-1]]


def index_tar(path: str | Path) -> TarIndex:
    """Lists the members of an uncompressed tar archive; reads nothing but headers.

    Raises:
        DataError: not a tar archive, damaged, cut short, or with members that are no regular files; names the member.
    """
    path = Path(path)
    try:
        with open_regular(path, DataError) as file:
            words, size = what_it_is(file.read(64)), file.seek(0, 2)
            if words:
                raise _damaged(f"not a tar archive: {words}")
            if size < BLOCK:
                raise _damaged("not a tar archive: it has no header")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _index(path, data, size)
    except OSError as error:
        raise _damaged(f"cannot read: {error.strerror}", shard=str(path)) from error
    except DataError as error:
        raise error.at(key=error.key, shard=str(path), offset=error.offset) from error


def _index(path: Path, data: mmap.mmap, size: int) -> TarIndex:
    headers, end = _walk(data, size)
    sizes = np.diff(headers, append=end) - BLOCK  # rounded up to whole blocks; the exact ones stand in the headers
    kinds = np.empty(len(headers), dtype=np.uint8)
    names = np.empty(len(headers), dtype="S100")
    prefixes: dict[int, bytes] = {}
    words = np.frombuffer(data, dtype=np.uint64, count=size // BLOCK * _WORDS).reshape(-1, _WORDS)
    try:
        for first in range(0, len(headers), _CHUNK):
            here = slice(first, first + _CHUNK)
            part = words[headers[here] // BLOCK]
            _check_sums(part, headers[here])
            block = part.view(np.uint8)
            digits = block[:, 124:135].astype(np.int64) - ord("0")
            exact = digits @ _OCTAL
            odd = ((digits < 0) | (digits > 7)).any(axis=1)
            for row in np.flatnonzero(odd).tolist():
                exact[row] = _size(block[row, 124:136].tobytes(), int(headers[first + row]))
            sizes[here] = exact
            kinds[here] = block[:, 156]
            names[here] = np.ascontiguousarray(block[:, :100]).view("S100")[:, 0]
            for row in np.flatnonzero((block[:, 345] != 0) & (block[:, 262] == 0)).tolist():  # ustar's name prefix
                prefixes[first + row] = block[row, 345:500].tobytes().split(b"\0")[0]
    finally:
        del words
    if prefixes:
        names = names.astype("S256")
        for row, prefix in prefixes.items():
            names[row] = prefix + b"/" + names[row]
    regular, extension = np.isin(kinds, _REGULAR), np.isin(kinds, _EXTENSIONS)
    for row in np.flatnonzero(~regular & ~extension & (kinds != _FOLDER))[:1].tolist():
        raise _damaged(f"tar member {_shown(names[row])} is not a regular file", offset=int(headers[row]))
    for row in np.flatnonzero(sizes > np.where(extension, MAX_EXTENSION, MAX_MEMBER))[:1].tolist():
        raise _damaged(
            f"tar member {_shown(names[row])} has {sizes[row]} bytes, beyond the limit", offset=int(headers[row])
        )
    starts, offsets = headers[regular], headers[regular] + BLOCK
    names, exact = names[regular], sizes[regular]
    if extension.any() and _tell_times_alone(data, headers, sizes, kinds):
        rows = np.flatnonzero(regular)
        starts = headers[rows - extension[rows - 1]]
    elif extension.any():
        starts, names = _named_by_tarfile(path, offsets, exact)
    raw = b"".join(name.split(b"\0")[0] + b"\0" for name in names.tolist())
    return TarIndex(starts=starts, offsets=offsets, sizes=exact, groups=_groups(names), end=end, raw_names=raw)


def _tell_times_alone(
    data: mmap.mmap, headers: NDArray[np.int64], sizes: NDArray[np.int64], kinds: NDArray[np.uint8]
) -> bool:
    """Whether all extension headers are pax headers of nothing but times, each before a member, which keeps its name and size.

    webdataset's own writer gives one to every member, for the fraction of a second.
    """
    extension = np.isin(kinds, _EXTENSIONS)
    if extension[-1] or (extension[1:] & extension[:-1]).any() or (kinds[extension] != _PAX).any():
        return False
    if sizes[kinds == _FOLDER].any():  # whose content tarfile does not step over
        return False
    for start, size in zip((headers[extension] + BLOCK).tolist(), sizes[extension].tolist()):
        lines = data[start : start + size].splitlines(keepends=True)
        for line in lines:  # 23 mtime=1700000000.5
            length, _, record = line.partition(b" ")
            if length != b"%d" % len(line) or line[-1:] != b"\n" or record.partition(b"=")[0] not in _TIMES:
                return False
        if not lines:
            return False
    return True


class _Steps(dict[bytes, int]):
    """Size field -> bytes from header to header. Many members share a size, and a look-up is cheaper than parsing."""

    def __missing__(self, field: bytes) -> int:
        size = int(field, 8)
        if size < 0:
            raise ValueError(field)
        self[field] = step = (size + 2 * BLOCK - 1) & -BLOCK
        return step


def _walk(data: mmap.mmap, size: int) -> tuple[NDArray[np.int64], int]:
    """Returns where headers lie, and where the archive ends."""
    headers: list[int] = []
    add, steps, position = headers.append, _Steps(), 0
    while True:
        try:
            while True:
                position += steps[data[position + 124 : position + 135]]
                add(position)
        except ValueError:
            pass  # the end, or a size that is written in another way
        block = data[position : position + BLOCK]
        if len(block) < BLOCK:
            last = headers[-2] if len(headers) > 1 else 0
            raise _damaged(f"cut short: it has {size} bytes, the mark at the end belongs at {position}", offset=last)
        if not any(block):
            headers.insert(0, 0)
            return np.array(headers[:-1], dtype=np.int64), position
        position += (_size(block[124:136], position) + 2 * BLOCK - 1) & -BLOCK
        add(position)


def _size(field: bytes, position: int) -> int:
    """Reads a size field that is not 11 octal digits."""
    text = field.strip(b" \0")
    try:
        if field[:1] in (b"\x80", b"\xff"):  # GNU's base 256, for members above 8 GB
            return int.from_bytes(field[1:], "big")
        return int(text, 8)
    except ValueError as error:
        raise _damaged(f"damaged tar header: its size reads {field!r}", offset=position) from error


def _check_sums(part: NDArray[np.uint64], headers: NDArray[np.int64]) -> None:
    """Compares the checksum of each header [N, 64 words] with the one it holds."""
    pairs = (part & _LOW_BYTES) + ((part >> np.uint64(8)) & _LOW_BYTES)  # four sums of bytes a word, 16 bits each
    lanes = np.ascontiguousarray(pairs.sum(axis=1, dtype=np.uint64)).view(np.uint16).reshape(-1, 4)
    field = part.view(np.uint8)[:, 148:156]
    sums = lanes.sum(axis=1, dtype=np.int64) - field.sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    digits = field[:, :6].astype(np.int64) - ord("0")
    wrong = (digits @ _OCTAL[-6:] != sums) | (digits < 0).any(axis=1) | (digits > 7).any(axis=1)
    for row in np.flatnonzero(wrong).tolist():
        text = field[row].tobytes().strip(b" \0")
        try:
            if int(text, 8) == sums[row]:
                continue
        except ValueError:
            pass
        raise _damaged(
            f"damaged tar header: its checksum reads {text!r}, found {sums[row]:o}", offset=int(headers[row])
        )


def _groups(names: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """Returns the first of each run of names that agree up to the first dot after the last slash."""
    width = names.dtype.itemsize
    columns: NDArray[Any] = np.arange(width, dtype=np.uint16 if width > 255 else np.uint8)
    first = np.ones(len(names), dtype=bool)
    for start in range(0, len(names), _CHUNK):
        begin = max(start - 1, 0)
        text = np.ascontiguousarray(names[begin : start + _CHUNK]).view(np.uint8).reshape(-1, width)
        dots = text == ord(".")
        slashes = text == ord("/")
        if slashes.any():
            after = np.where(slashes.any(axis=1), width - slashes[:, ::-1].argmax(axis=1), 0)
            dots &= columns >= after[:, None]
        ends = np.where(dots.any(axis=1), dots.argmax(axis=1), width - 1).astype(columns.dtype)
        keys = np.where(columns <= ends[:, None], text, 0).view(f"V{width}")[:, 0]
        first[begin + 1 : start + _CHUNK] = keys[1:] != keys[:-1]
    return np.flatnonzero(first)


def _shown(name: bytes) -> str:
    return repr(bytes(name).decode("utf-8", "backslashreplace"))


def _plain_name(name: bytes) -> str:
    try:
        text = name.decode()
    except UnicodeDecodeError as error:
        raise _damaged(f"tar member {_shown(name)}: its name is not UTF-8") from error
    if text.startswith("/") or (".." in text and ".." in text.split("/")):
        raise _damaged(f"tar member {text!r} leads out of the archive")
    return text


def _named_by_tarfile(
    path: Path, offsets: NDArray[np.int64], sizes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bytes_]]:
    names, starts, places = [], [], []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise _damaged(f"tar member {member.name!r} is not a regular file", offset=member.offset)
                names.append(member.name.encode("utf-8", "surrogateescape"))
                starts.append(member.offset)
                places.append((member.offset_data, member.size))
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise _damaged(f"damaged extension header: {error}") from error
    if places != list(zip(offsets.tolist(), sizes.tolist())):
        raise _damaged("extension headers give members another place than their own headers")
    return np.array(starts, dtype=np.int64), np.array(names, dtype=np.bytes_)


def parse_header(block: bytes, position: int = 0) -> tuple[str, int]:
    """Returns (name, bytes) of the tar member whose header lies at ``position``.

    Raises:
        DataError: damaged, or no regular file (links and devices are never followed).
    """
    try:
        header = tarfile.TarInfo.frombuf(block[position : position + BLOCK], "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise _damaged(f"damaged tar header: {error}") from error
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or header.size < 0:
        raise _damaged(f"tar member {header.name!r} is not a regular file")
    return header.name, header.size


def parse_members(block: bytes) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of the tar members in ``block``; raises DataError as ``parse_header``, or if cut short."""
    position = 0
    while position < len(block):
        if block[position + 156 : position + 157] in (b"x", b"g", b"L", b"K"):
            yield from _members_by_tarfile(block[position:])
            return
        if block[position + 156 : position + 157] == b"5":
            position += BLOCK
            continue
        name, size = parse_header(block, position)
        start = position + BLOCK
        if start + size > len(block):
            raise _damaged(f"tar member {name!r} is cut short")
        yield name, block[start : start + size]
        position = start + size + -size % BLOCK


def _members_by_tarfile(block: bytes) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(fileobj=io.BytesIO(block), mode="r:") as archive:
            for member in archive:
                if member.isdir():
                    continue
                content = archive.extractfile(member) if member.isreg() and not member.issparse() else None
                if content is None:
                    raise _damaged(f"tar member {member.name!r} is not a regular file")
                yield member.name, content.read()
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise _damaged(f"damaged extension header: {error}") from error
