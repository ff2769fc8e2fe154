"""Tars of other tools as shards: the index is built, the tars stay where they are and what they are.

index_tar: members --webdataset's rule--> samples --parts checked, images probed--> the same index as our own shards
"""

import dataclasses
import hashlib
import itertools
import mmap
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.data.formats.records import Record
from megatron_vlm.data.formats.webdataset import Layout, images_of, is_text, parse_parts, split_name
from megatron_vlm.data.images import MAX_BYTES, probe_image
from megatron_vlm.data.sample import RawSample
from megatron_vlm.data.shards import MAX_IMAGES, MAX_SPAN, save_index
from megatron_vlm.data.tar import TarIndex, index_tar, parse_members
from megatron_vlm.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TarJob:
    """One tar to index as shard ``name`` of ``folder``; ``source`` is the number of its source."""

    folder: str
    name: str
    tar: str
    layout: Layout
    layout_number: int
    source: int


def index_shard(job: TarJob) -> dict[str, Any]:
    """Indexes one tar and returns its line of the manifest, its samples by source, and what is rejected.

    A tar that is damaged as a whole is one problem, with record -1.
    """
    samples: list[tuple[int, ...]] = []
    images: list[tuple[int, ...]] = []
    rejected: list[dict[str, Any]] = []

    def reject(record: int, message: str) -> None:
        rejected.append({"source": job.source, "record": record, "file": job.tar, "message": message})

    size, digest = 0, ""
    try:
        path = Path(job.tar)
        if not path.is_file():
            raise DataError("No such file" if not path.exists() else "not a regular file")
        index = index_tar(path)
        names = index.names()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            size, digest = len(data), hashlib.sha256(data).hexdigest()
            for number, (first, last) in enumerate(_bounds(index)):
                try:
                    found = _sample(job.layout, data, index, names, first, last)
                except DataError as error:
                    reject(number, f"{names[first]}: {error.message}")
                    continue
                start = int(index.starts[first])
                span = (int(index.starts[last]) if last < len(index.starts) else index.end) - start
                crc = zlib.crc32(data[start : start + span])
                samples.append((start, span, crc, len(images), len(found)))
                images += found
    except DataError as error:
        samples, images = [], []
        reject(-1, error.message)
    line: dict[str, Any] = {
        "name": f"{job.name}.tar",
        "samples": len(samples),
        "images": len(images),
        "bytes": size,
        "sha256": digest,
    }
    line |= {"tar": job.tar, "layout": job.layout_number}
    if samples:
        line["index"] = save_index(Path(job.folder, job.name), samples, images)
    return {"shard": line, "by_source": [(job.source, len(samples))], "rejected": rejected}


def _bounds(index: TarIndex) -> list[tuple[int, int]]:
    groups = [*index.groups.tolist(), len(index.starts)]
    return list(itertools.pairwise(groups))


def _sample(
    layout: Layout, data: mmap.mmap, index: TarIndex, names: Sequence[str], first: int, last: int
) -> list[tuple[int, ...]]:
    """Checks the members ``first`` to ``last`` as a sample and returns its rows of the image table."""
    parts = [split_name(name)[1] for name in names[first:last]]
    if len(set(parts)) != len(parts):
        raise DataError(f"two members of one name: {', '.join(names[first:last][:10])}")
    if int(index.offsets[last - 1] + index.sizes[last - 1] - index.starts[first]) > MAX_SPAN:
        raise DataError(f"the sample has more than {MAX_SPAN} bytes, the limit")
    chosen = [first + i for i in images_of(layout, parts)]
    if len(chosen) > MAX_IMAGES:
        raise DataError(f"{len(chosen)} images, the limit is {MAX_IMAGES}")
    rows: list[tuple[int, ...]] = []
    for at in chosen:
        start, size = int(index.offsets[at]), int(index.sizes[at])
        if size > MAX_BYTES:
            raise DataError(f"image {names[at]} has {size} bytes, the limit is {MAX_BYTES}")
        content = data[start : start + size]
        _, width, height = probe_image(content, f"image {names[at]}")
        rows.append((start, size, zlib.crc32(content), width, height))
    texts = {}
    for at, part in zip(range(first, last), parts):
        if is_text(part):
            texts[part] = data[int(index.offsets[at]) : int(index.offsets[at] + index.sizes[at])]
    parse_parts(layout, texts, len(rows))
    return rows


def read_tar_sample(layout: Layout, block: bytes, num_images: int) -> RawSample:
    """Reads a sample from its span of a tar, without its images.

    Raises:
        DataError: what is wrong with it.
    """
    texts, parts, key = {}, [], ""
    for name, content in parse_members(block):
        key, part = split_name(name)
        parts.append((part, name))
        if is_text(part):
            texts[part] = content
    record: Record = parse_parts(layout, texts, num_images)
    chosen = images_of(layout, [part for part, _ in parts])
    return RawSample(key=key, turns=record.turns, image_names=tuple(parts[i][1] for i in chosen))
