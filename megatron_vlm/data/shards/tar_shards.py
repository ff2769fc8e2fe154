"""Tars of other tools as shards: the index is built, the tars stay where they are and what they are.

index_shard: tar --samples_of_tar--> samples, checked --images probed--> the same index as our own shards,
                                                      or one of each half: each names its own samples of the tar
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.data.formats.webdataset import (
    SampleForm,
    TarSample,
    images_of,
    is_text,
    parse_parts,
    samples_of_tar,
    split_name,
    stray,
)
from megatron_vlm.data.images.pictures import probe_image
from megatron_vlm.data.problems import Notes
from megatron_vlm.data.sample import RawSample
from megatron_vlm.data.shards.tar import parse_members
from megatron_vlm.data.shards.writer import save_index
from megatron_vlm.errors import DataError, Reason
from megatron_vlm.files import file_digest


@dataclasses.dataclass(frozen=True, kw_only=True)
class TarJob:
    """One tar to index as shard ``name`` of each of ``folders``; ``source`` is the number of its source.

    ``halves`` says in which of the folders each of its samples goes; None: there is but one.
    """

    folders: Sequence[str]
    name: str
    tar: str
    form: SampleForm
    form_number: int
    source: int
    halves: Mapping[int, int] | None = None


def index_shard(job: TarJob) -> list[dict[str, Any]]:
    """Indexes one tar and returns, for each folder, its line of the manifest, its samples by source, and what is rejected.

    A tar that is damaged as a whole is one problem, with record -1. What is rejected stands in the first folder's.
    """
    notes = Notes()
    tables: list[tuple[list[tuple[int, ...]], list[tuple[int, ...]]]] = [([], []) for _ in job.folders]
    rejected: list[dict[str, Any]] = []

    def reject(record: int, error: DataError) -> None:
        problem = {"source": job.source, "record": record, "file": job.tar, "key": error.key or ""}
        rejected.append(problem | {"message": error.message, "reason": error.reason.number})

    digest: dict[str, Any] = {"size": 0, "sha256": ""}
    try:
        for number, sample in samples_of_tar(Path(job.tar), job.form, notes):
            if isinstance(sample, DataError):
                reject(number, sample)
                continue
            if job.halves is not None and number not in job.halves:
                raise DataError(
                    "the tar has changed since the halves were drawn: build again", reason=Reason.DAMAGED_SHARD
                )
            notes.add("", Reason.UNKNOWN_KEYS, sample.record.unknown)
            samples, images = tables[job.halves[number] if job.halves is not None else 0]
            try:
                rows = _image_rows(sample)
            except DataError as error:
                reject(number, error.at(key=sample.key))
                continue
            samples.append((sample.start, len(sample.block), zlib.crc32(sample.block), len(images), len(rows)))
            images += rows
        digest = file_digest(job.tar, DataError)
    except DataError as error:
        tables = [([], []) for _ in job.folders]
        reject(-1, error)
    results = []
    for folder, (samples, images) in zip(job.folders, tables):
        line = {"name": f"{job.name}.tar", "samples": len(samples), "images": len(images), "bytes": digest["size"]}
        line |= {"sha256": digest["sha256"], "tar": job.tar, "layout": job.form_number}
        if samples:
            line["index"] = save_index(Path(folder, job.name), samples, images)
        found = [(job.source, reason.number, name, number) for (_, reason, name), number in notes.counts.items()]
        result = {"shard": line, "by_source": [(job.source, len(samples))], "rejected": rejected, "notes": found}
        results.append(result)
        rejected, notes = [], Notes()
    return results


def _image_rows(sample: TarSample) -> list[tuple[int, ...]]:
    """Decodes a sample's images and returns its rows of the image table."""
    rows: list[tuple[int, ...]] = []
    for name, at, size in sample.images:
        content = sample.block[at : at + size]
        _, width, height = probe_image(content, f"image {name}")
        rows.append((sample.start + at, size, zlib.crc32(content), width, height))
    return rows


def read_tar_sample(form: SampleForm, block: bytes, num_images: int) -> RawSample:
    """Reads a sample from its span of a tar, without its images.

    Raises:
        DataError: what is wrong with it.
    """
    texts, parts, key = {}, [], ""
    for name, content in parse_members(block):
        if stray(name):
            continue
        key, part = split_name(name)
        parts.append((part, name))
        if is_text(part):
            texts[part] = content
    record = parse_parts(form, texts, num_images)
    chosen = images_of(form, [part for part, _ in parts])
    names = tuple(parts[i][1] for i in chosen)
    return RawSample(key=key, turns=record.turns, image_names=names, label=record.label)
