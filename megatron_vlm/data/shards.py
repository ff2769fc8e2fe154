"""Tar shards and their index: written once, read sample by sample with one ``pread``.

    DIR/manifest.json              shards with samples, images, bytes and sha256
    DIR/shard-000000.tar           KEY.json, KEY.0.png, KEY.1.jpg ...: any webdataset reader opens it
    DIR/shard-000000.samples.npy   SAMPLE_DTYPE a sample: where it lies, its crc32, its images
    DIR/shard-000000.images.npy    uint16 [images, 2]: width and height, upright

The same records give the same bytes: member headers carry no time, owner or path of this machine.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import tarfile
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.data.formats.records import IMAGE_PLACEHOLDER, Record, check_turns, strict_decoder
from megatron_vlm.data.images import probe_image
from megatron_vlm.data.sample import RawSample, Turn
from megatron_vlm.errors import ConfigError, DataError

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
SAMPLE_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # of the first member's header
        ("span", "<u4"),  # bytes up to the next sample
        ("crc32", "<u4"),  # of those bytes
        ("first_image", "<u4"),  # row of the shard's image table
        ("num_images", "<u2"),
    ]
)
BLOCK = 512
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")


def build_shards(
    sources: Iterable[tuple[str, Iterable[Record]]],
    out: str | Path,
    *,
    image_root: str | Path | None = None,
    samples_per_shard: int = 1000,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Writes records and the original bytes of their images as shards.

    Everything goes to a fresh folder beside ``out`` that is renamed at the end, so ``out`` is whole or absent.

    Args:
        sources: (name of the source file, its records). A sample's key is the source's stem and the record's number.
        out: the folder to make; must not exist, or be empty.
        image_root: folder that relative image paths start from; None: each is taken as it is.
        samples_per_shard: samples in every shard but the last.
        progress: called with the number of samples written so far.

    Returns:
        The manifest.

    Raises:
        ConfigError: ``out`` holds something, or a setting cannot work.
        DataError: a record or image that cannot be used, with source and record number.
    """
    out = Path(out)
    if samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder: remove it or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}.tmp-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        manifest = _write_all(sources, temporary, Path(image_root or "."), samples_per_shard, progress)
        if out.exists():
            out.rmdir()
        os.rename(temporary, out)
        _sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def _write_all(sources, folder: Path, image_root: Path, samples_per_shard: int, progress) -> dict[str, Any]:
    shards: list[dict[str, Any]] = []
    writer: ShardWriter | None = None
    names: list[str] = []
    total = 0
    for source, records in sources:
        stem = _unique_stem(source, names)
        for record in records:
            if writer is None:
                writer = ShardWriter(folder / f"shard-{len(shards):06d}.tar")
            try:
                writer.add(_sample_members(f"{stem}-{record.number:09d}", source, record, image_root))
            except DataError as error:
                raise DataError(error.message, key=f"record {record.number}", shard=source) from error
            total += 1
            if progress is not None:
                progress(total)
            if writer.num_samples == samples_per_shard:
                shards.append(writer.close())
                writer = None
    if writer is not None:
        shards.append(writer.close())
    if not total:
        raise DataError(f"no records in {', '.join(names) or 'the inputs'}")
    manifest = {
        "version": MANIFEST_VERSION,
        "samples": total,
        "images": sum(shard["images"] for shard in shards),
        "sources": names,
        "shards": shards,
    }
    _write_synced(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    _sync_folder(folder)
    return manifest


def _unique_stem(source: str, names: list[str]) -> str:
    stem = _UNSAFE.sub("-", Path(source).stem)[:60] or "source"
    taken = {_UNSAFE.sub("-", Path(name).stem)[:60] or "source" for name in names}
    names.append(Path(source).name)
    return f"{stem}-{len(names) - 1}" if stem in taken else stem


def _sample_members(
    key: str, source: str, record: Record, root: Path
) -> tuple[list[tuple[str, bytes]], list[tuple[int, int]]]:
    members, sizes = [], []
    for index, name in enumerate(record.images):
        try:
            data = (root / name).read_bytes()
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read image {root / name}: {getattr(error, 'strerror', error)}") from error
        extension, width, height = probe_image(data, f"image {root / name}")
        members.append((f"{key}.{index}.{extension}", data))
        sizes.append((width, height))
    text = {
        "id": record.label,
        "source": Path(source).name,
        "record": record.number,
        "turns": [{"role": turn.role, "text": turn.text} for turn in record.turns],
        "images": list(record.images),
    }
    return [(f"{key}.json", json.dumps(text, ensure_ascii=False).encode()), *members], sizes


class ShardWriter:
    """Writes one tar shard and, on ``close``, its index."""

    def __init__(self, path: Path):
        self.path = path
        self.num_samples = 0
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._size = 0
        self._samples: list[tuple[int, int, int, int, int]] = []
        self._sizes: list[tuple[int, int]] = []

    def add(self, sample: tuple[list[tuple[str, bytes]], list[tuple[int, int]]]) -> None:
        """Appends one sample: its members (name, bytes) and the size of each image."""
        members, sizes = sample
        parts = []
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            parts += [header.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % BLOCK)]
        block = b"".join(parts)
        self._samples.append((self._size, len(block), zlib.crc32(block), len(self._sizes), len(sizes)))
        self._sizes += sizes
        self.num_samples += 1
        self._write(block)

    def close(self) -> dict[str, Any]:
        """Ends the shard and returns its line of the manifest."""
        self._write(bytes(2 * BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        _save_array(self.path.with_suffix(".samples.npy"), np.array(self._samples, dtype=SAMPLE_DTYPE))
        _save_array(self.path.with_suffix(".images.npy"), np.array(self._sizes, dtype="<u2").reshape(-1, 2))
        return {
            "name": self.path.name,
            "samples": self.num_samples,
            "images": len(self._sizes),
            "bytes": self._size,
            "sha256": self._hash.hexdigest(),
        }

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)


def parse_header(block: bytes, position: int = 0) -> tuple[str, int]:
    """Returns (name, bytes) of the tar member whose header lies at ``position``.

    Raises:
        DataError: damaged, or no regular file (links and devices are never followed).
    """
    try:
        header = tarfile.TarInfo.frombuf(block[position : position + BLOCK], "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise DataError(f"damaged tar header: {error}") from error
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or header.size < 0:
        raise DataError(f"tar member {header.name!r} is not a regular file")
    return header.name, header.size


def parse_members(block: bytes) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of the tar members in ``block``; raises DataError as ``parse_header``, or if cut short."""
    position = 0
    while position < len(block):
        name, size = parse_header(block, position)
        start = position + BLOCK
        if start + size > len(block):
            raise DataError(f"tar member {name!r} is cut short")
        yield name, block[start : start + size]
        position = start + size + -size % BLOCK


def parse_sample(block: bytes) -> RawSample:
    """Reads one sample from its span of a shard.

    Raises:
        DataError: what is wrong with it.
    """
    members = list(parse_members(block))
    if not members:
        raise DataError("an empty sample")
    sample = parse_text(*members[0])
    key, number = sample.key, len(sample.image_names)
    if any(not name.startswith(f"{key}.{index}.") for index, (name, _) in enumerate(members[1:])):
        raise DataError(f"members {[name for name, _ in members]} are not one sample's", key=key)
    if number != len(members) - 1:
        raise DataError(f"{key}.json names {number} images, the shard holds {len(members) - 1}", key=key)
    return dataclasses.replace(sample, images=tuple(data for _, data in members[1:]))


def parse_text(name: str, content: bytes) -> RawSample:
    """Reads a sample's ``KEY.json`` member: all but its images.

    Raises:
        DataError: what is wrong with it.
    """
    key = name.removesuffix(".json")
    if key == name:
        raise DataError(f"a sample starts with its KEY.json member, not with {name!r}")
    try:
        data = strict_decoder().decode(content.decode("utf-8"))
        turns = tuple(Turn(role=turn["role"], text=turn["text"]) for turn in data["turns"])
        return RawSample(key=key, turns=turns, image_names=tuple(data["images"]), options=data.get("options", {}))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"bad {name}: {error!r}", key=key) from error


def check_sample(sample: RawSample) -> list[tuple[int, int]]:
    """Checks a sample as ``build_shards`` does and returns (width, height) of each image.

    Raises:
        DataError: what is wrong with it.
    """
    check_turns(sample.turns, len(sample.images))
    return [probe_image(data, f"image {name}")[1:] for name, data in zip(sample.image_names, sample.images)]


def num_placeholders(turns: Iterable[Turn]) -> int:
    """Returns the number of ``<image>`` placeholders."""
    return sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
