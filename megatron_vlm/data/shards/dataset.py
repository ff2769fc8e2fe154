"""Shard folders read as one list of samples: id -> (shard, row) -> RawSample; only shard counts stay in memory."""

import hashlib
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.formats.webdataset import SampleForm
from megatron_vlm.data.sample import MAX_SPAN, RawSample
from megatron_vlm.data.shards.tar import BLOCK, parse_header
from megatron_vlm.data.shards.tar_shards import read_tar_sample
from megatron_vlm.data.shards.writer import (
    IMAGE_DTYPE,
    MANIFEST,
    MANIFEST_VERSION,
    SAMPLE_DTYPE,
    parse_text,
)
from megatron_vlm.data.stream.mixture import exactly
from megatron_vlm.errors import DataError, Reason
from megatron_vlm.files import open_regular, read_json

_PARSING = (
    Lock()
)  # of headers, by ast, which threads of Python 3.11 disturb in one another ("recursion depth mismatch")
_MOST = 2**48  # of samples, images or bytes of a shard
MAX_OPEN = 128  # shards whose file and index stay open in each process
TEXT_BYTES = 8192  # read at first for a sample's text: most fit
_damaged = partial(DataError, reason=Reason.DAMAGED_SHARD)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar shard, ``name`` in ``folder``; ``num_bytes`` and ``sha256`` as the manifest says.

    ``index`` are the crc32 of the rows of its sample table and of its image table.
    ``tar`` is where the tar lies if it is one of other tools, used as it is, and ``form`` what its samples look like;
    its index lies in ``folder`` all the same, and may name only some of its samples.
    """

    folder: str
    name: str
    num_samples: int
    num_images: int
    num_bytes: int
    sha256: str
    index: tuple[int, int] | None = None
    tar: str = ""
    form: SampleForm | None = None

    @property
    def path(self) -> Path:
        """The tar file. Made when asked for: a run may have a hundred thousand shards."""
        return Path(self.tar or os.path.join(self.folder, self.name))

    @property
    def identity(self) -> str:
        """Hex digest of its samples: of the tar; of one of other tools also what its index names, and how that is read."""
        if self.form is None:
            return self.sha256
        form = f"{self.form.kind} {sorted(self.form.fields.items())} {self.form.prepend}"
        return hashlib.sha256(f"{self.sha256} {self.index} {form}".encode()).hexdigest()

    def beside(self, suffix: str) -> Path:
        """A file of its index."""
        return Path(self.folder, self.name.removesuffix(".tar") + suffix)


@dataclass(frozen=True, slots=True)
class _OpenFile:
    """A descriptor that is closed when nobody has it any more."""

    number: int

    def __del__(self) -> None:
        os.close(self.number)


class Dataset:
    """Samples of one or more shard folders, in order.

    Travels to worker processes; files are opened where they are read.

    Raises:
        DataError: a folder without manifest, a missing shard, or one whose size differs from the manifest's.
    """

    def __init__(self, paths: Sequence[str | Path]):
        if not paths:
            raise DataError("no data: name at least one folder made by 'megatron-vlm data build'")
        manifests = [_read_manifest(Path(path)) for path in paths]
        self.shards = tuple(shard for shards, _ in manifests for shard in shards)
        self._ends = np.cumsum([shard.num_samples for shard in self.shards], dtype=np.int64)
        starts = np.cumsum([0] + [sum(shard.num_samples for shard in shards) for shards, _ in manifests]).tolist()
        # Of each folder its sources: name, first id, samples, samples that an epoch reads.
        self.folders = tuple(
            tuple((name, start + first, samples, per_epoch) for name, first, samples, per_epoch in sources)
            for start, (_, sources) in zip(starts, manifests)
        )
        self._reset()

    def _reset(self) -> None:
        recent = lru_cache(MAX_OPEN)
        self._files = recent(lambda shard: _OpenFile(os.open(self.shards[shard].path, os.O_RDONLY)))
        self._samples, self._images = recent(self._open_samples), recent(self._open_images)

    def __getstate__(self) -> dict[str, Any]:
        return {"shards": self.shards, "folders": self.folders, "_ends": self._ends}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def digest(self) -> str:
        """Hex digest of the content and order of all shards."""
        return hashlib.sha256("".join(shard.identity for shard in self.shards).encode()).hexdigest()[:32]

    def locate(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the shard and the row in it of each id (int64 arrays)."""
        shards = np.searchsorted(self._ends, ids, side="right")
        return shards, ids - np.where(shards > 0, self._ends[shards - 1], 0)

    def locate_one(self, sample_id: int) -> tuple[int, int]:
        """Returns the shard and the row in it of one id."""
        shard = bisect_right(self._ends, sample_id)
        return shard, sample_id - self.first_id(shard)

    def first_id(self, shard: int) -> int:
        """Returns the id of a shard's first sample."""
        return int(self._ends[shard - 1]) if shard else 0

    def index(self, shard: int) -> NDArray[Any]:
        """Returns the sample table of a shard (``SAMPLE_DTYPE``), mapped from disk."""
        return self._samples(shard)

    def image_sizes(self, shard: int) -> NDArray[np.uint16]:
        """Returns uint16 [images, 2], width and height of a shard's images, sample by sample."""
        table = self._images(shard)
        return np.stack([table["width"], table["height"]], axis=1)

    def sizes_of(self, shard: int, row: int) -> list[tuple[int, int]]:
        """Returns width and height of the images of the sample in a row of a shard."""
        first, number = (int(self.index(shard)[row][name]) for name in ("first_image", "num_images"))
        return self._images(shard)[["width", "height"]][first : first + number].tolist()

    def read(self, sample_id: int) -> RawSample:
        """Reads one sample.

        Raises:
            DataError: unreadable or damaged; names the shard and the offset.
        """
        return self.read_row(*self.locate_one(sample_id))

    def read_row(self, shard: int, row: int) -> RawSample:
        """Reads the sample in a row of a shard; raises as ``read``."""
        entry = self.index(shard)[row]
        with self._naming(shard, entry):
            block = self._pread(shard, int(entry["offset"]), int(entry["span"]))
            if zlib.crc32(block) != int(entry["crc32"]):
                raise _damaged("damaged: its crc32 differs from the index")
            first = int(entry["first_image"])
            table = self._images(shard)[first : first + int(entry["num_images"])]
            images = tuple(self._image(shard, image, block, int(entry["offset"])) for image in table)
            return replace(self._text(shard, row, block), images=images)

    def _image(self, shard: int, image: Any, block: bytes, offset: int) -> bytes:
        start, size = int(image["offset"]) - offset, int(image["size"])
        if start >= 0 and start + size <= len(block):
            return block[start : start + size]
        data = self._pread(shard, int(image["offset"]), size)  # another sample of the shard holds it
        if zlib.crc32(data) != int(image["crc32"]):
            raise _damaged("damaged: the crc32 of an image differs from the index")
        return data

    def read_text(self, shard: int, row: int) -> RawSample:
        """Reads a sample without its images (and so without its crc32); raises as ``read``."""
        entry = self.index(shard)[row]
        with self._naming(shard, entry):
            return self._text(shard, row, b"")

    def _text(self, shard: int, row: int, block: bytes) -> RawSample:
        """Reads a sample's text; ``block`` is its span if that is at hand."""
        entry = self.index(shard)[row]
        span, form = int(entry["span"]), self.shards[shard].form
        if form is not None:
            block = block or self._pread(shard, int(entry["offset"]), span)
            return read_tar_sample(form, block, int(entry["num_images"]))
        block = block or self._pread(shard, int(entry["offset"]), min(span, TEXT_BYTES))
        name, size = parse_header(block)
        if size + BLOCK > len(block):
            block = self._pread(shard, int(entry["offset"]), min(span, size + BLOCK))
        return parse_text(name, block[BLOCK : BLOCK + size])

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        if size > MAX_SPAN:
            raise _damaged(f"the sample has {size} bytes, the limit is {MAX_SPAN}")
        try:
            block = os.pread(self._files(shard).number, size, offset)
        except OSError as error:
            raise _damaged(f"cannot read: {error.strerror}") from error
        if len(block) != size:
            raise _damaged(f"the shard is cut short: {len(block)} of {size} bytes")
        return block

    @contextmanager
    def _naming(self, shard: int, entry: Any) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            name, offset = str(self.shards[shard].path), int(entry["offset"])
            raise error.at(key=error.key, shard=error.shard or name, offset=offset) from error

    def close(self) -> None:
        """Closes the files."""
        for recent in (self._files, self._samples, self._images):
            recent.cache_clear()

    def _open_samples(self, shard: int) -> NDArray[Any]:
        info = self.shards[shard]
        return _open_array(info.beside(".samples.npy"), SAMPLE_DTYPE, info.num_samples, info.index and info.index[0])

    def _open_images(self, shard: int) -> NDArray[Any]:
        info = self.shards[shard]
        return _open_array(info.beside(".images.npy"), IMAGE_DTYPE, info.num_images, info.index and info.index[1])


def read_table(path: Path, dtype: np.dtype, length: int) -> NDArray[Any]:
    """Maps an array of rows from disk.

    Raises:
        DataError: it cannot be read, or is not of ``length`` rows of ``dtype``.
    """
    open_regular(path, DataError).close()
    try:
        # An empty array cannot be mapped, and a text-only shard has one.
        with _PARSING:
            array: Any = np.load(path, mmap_mode="r" if length else None, allow_pickle=False)
    except Exception as error:  # a damaged header is a small program text: whatever Python makes of it
        raise _damaged(f"cannot read the index: {error}", shard=str(path)) from error
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != (length,):
        found = f"{array.shape} of {array.dtype}" if isinstance(array, np.ndarray) else "no array"
        raise _damaged(f"the index has {found}, expected {length} rows of {dtype}", shard=str(path))
    return array


def _open_array(path: Path, dtype: np.dtype, length: int, crc32: int | None) -> NDArray[Any]:
    array = read_table(path, dtype, length)
    if crc32 is not None and zlib.crc32(array.tobytes()) != crc32:
        raise _damaged("damaged: the crc32 of the index differs from the manifest", shard=str(path))
    return array


def _read_manifest(folder: Path) -> tuple[list[Shard], list[tuple[str, int, int, Fraction]]]:
    path = folder / MANIFEST
    if not os.path.isfile(path):
        raise _damaged(_no_manifest(folder), shard=str(folder))
    try:
        manifest = read_json(path, DataError)
        if manifest["version"] != MANIFEST_VERSION:
            raise _damaged(f"version {manifest['version']} is not read here, only {MANIFEST_VERSION}", shard=str(path))
        forms = [SampleForm(**form) for form in manifest.get("layouts", [])]
        shards = [
            Shard(
                folder=str(folder),
                name=str(item["name"]),
                num_samples=int(item["samples"]),
                num_images=int(item["images"]),
                num_bytes=int(item["bytes"]),
                sha256=str(item["sha256"]),
                index=tuple(item["index"]) if "index" in item else None,
                tar=str(item.get("tar", "")),
                form=forms[item["layout"]] if "layout" in item else None,
            )
            for item in manifest["shards"]
        ]
        sources = _read_sources(manifest.get("sources"), sum(shard.num_samples for shard in shards), folder.name)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise _damaged(f"not a readable manifest: {error!r}", shard=str(path)) from error
    for shard in shards:
        numbers = (shard.num_samples, shard.num_images, shard.num_bytes)
        if not all(0 <= number < _MOST for number in numbers):
            raise _damaged(f"shard {shard.name} has {numbers} samples, images and bytes", shard=str(path))
        if os.path.basename(shard.name) != shard.name:
            raise _damaged(f"shard name {shard.name} leads out of its folder", shard=str(path))
        try:
            size = os.stat(shard.tar or os.path.join(shard.folder, shard.name)).st_size
        except (OSError, ValueError):  # ValueError: a null byte in the name
            size = None
        if size != shard.num_bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise _damaged(f"the shard {found}, the manifest says {shard.num_bytes} bytes", shard=str(shard.path))
    return shards, sources


def _no_manifest(folder: Path) -> str:
    """What to do about a path that is no folder of shards."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        formats = {".tar": "webdataset", ".parquet": "parquet", ".arrow": "parquet", ".txt": "xcomposer"}
        format = formats.get(folder.suffix.lower(), "llava | openai | internvl | xcomposer")
        command = f"megatron-vlm data build --format {format} --input {folder} --out DIR"
        return f"a file, and no folder of shards: build one first with `{command}`, and name DIR"
    what = "no manifest.json" if os.path.isdir(folder) else "no such folder"
    return f"{what}: name a folder made by 'megatron-vlm data build'"


MAX_PER_EPOCH = 10**12
"""Samples of a source in an epoch; more is damage, and would be counted for ever."""


def _read_sources(items: Any, samples: int, folder: str) -> list[tuple[str, int, int, Fraction]]:
    """Returns name, first sample, samples and samples an epoch of each source; without any, the folder is one."""
    if not items or isinstance(items[0], str):
        return [(folder, 0, samples, Fraction(samples))]
    sources, first = [], 0
    for item in items:
        number, repeat, per_epoch = int(item["samples"]), item.get("repeat"), item.get("per_epoch")
        if int(item["first_sample"]) != first or number < 0:
            raise ValueError(
                f"source {item['name']!r} starts at {item['first_sample']}, the one before ends at {first}"
            )
        wanted = Fraction(number) if repeat is None else number * exactly(float(repeat))
        wanted = wanted if per_epoch is None else Fraction(int(per_epoch))
        if not 0 <= wanted <= MAX_PER_EPOCH or (wanted and not number):
            raise ValueError(f"source {item['name']!r} has {number} samples, an epoch cannot read {wanted} of them")
        if number:
            sources.append((str(item["name"]), first, number, wanted))
        first += number
    if first != samples:
        raise ValueError(f"its sources hold {first} samples, its shards {samples}")
    return sources
