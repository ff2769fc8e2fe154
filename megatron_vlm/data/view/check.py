"""Checks data before anybody trains on it: a shard folder, or records in a public format as they are.

folder   files against the manifest, crc32, text, images decoded, sizes against the index
records  read, images found and decoded; also those of webdataset's tars
both     placeholders, roles, answers; with a processor: too long, nothing supervised; warnings: duplicate ids, keys
         that nobody knows, special tokens in texts
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.data.formats import read_source
from megatron_vlm.data.formats.records import RecordSource
from megatron_vlm.data.images.pictures import probe_image
from megatron_vlm.data.problems import Notes
from megatron_vlm.data.sample import Turn
from megatron_vlm.data.shards.dataset import Dataset
from megatron_vlm.data.shards.writer import check_sample, load_record
from megatron_vlm.data.types import NO_OPTIONS, Processor
from megatron_vlm.errors import DataError, Reason
from megatron_vlm.files import file_digest


def check_folder(folder: str | Path, processor: Processor | None = None) -> Iterator[str | DataError]:
    """Yields the key of each sound sample and a DataError for each problem.

    Args:
        folder: of shards; one whose manifest cannot be read gives that one problem.
        processor: also finds what it cannot train on; its ``seq_length`` is the limit.
    """
    try:
        dataset = Dataset([folder])
    except DataError as error:
        yield error
        return
    seen: dict[str, str] = {}
    notes = Notes()
    try:
        for number, shard in enumerate(dataset.shards):
            if file_digest(shard.path, DataError)["sha256"] != shard.sha256:
                message = "damaged: its sha256 differs from the manifest"
                yield DataError(message, reason=Reason.DAMAGED_SHARD, shard=str(shard.path))
            yield from _check_shard(dataset, number, processor, seen, notes)
        yield from notes.warnings()
    finally:
        dataset.close()


def check_sources(sources: Sequence[RecordSource], processor: Processor | None = None) -> Iterator[str | DataError]:
    """Yields the name of each sound record and a DataError for each problem.

    Args:
        sources: as ``formats.open_sources`` gives them.
        processor: as in ``check_folder``.
    """
    for source in sources:
        seen: dict[str, str] = {}
        notes = Notes()
        try:
            for number, _, record in read_source(source, notes):
                if isinstance(record, DataError):
                    yield record
                    continue
                where: dict[str, Any] = {"shard": record.file or source.path, "key": record.key or f"record {number}"}
                notes.add(source.path, Reason.UNKNOWN_KEYS, record.unknown)
                try:
                    turns, images = load_record(source, record)
                    sizes = [probe_image(data, f"image {name}")[1:] for name, data in images]
                    _check_processor(processor, turns, sizes, record.options)
                    notes.add(source.path, Reason.SPECIAL_TOKENS_AS_TEXT, _special_tokens(processor, turns))
                except DataError as error:
                    yield error.at(**where)
                else:
                    yield record.key or f"{source.title} record {number}"
                yield from _check_label(record.label, seen, where)
        except DataError as error:  # the rest of the file cannot be read
            yield error
        yield from notes.warnings()


def _check_shard(
    dataset: Dataset, number: int, processor: Processor | None, seen: dict[str, str], notes: Notes
) -> Iterator[str | DataError]:
    name = str(dataset.shards[number].path)
    try:
        index, sizes = dataset.index(number), dataset.image_sizes(number)
    except DataError as error:
        yield error
        return
    for row, entry in enumerate(index):
        where: dict[str, Any] = {"shard": name, "offset": int(entry["offset"])}
        try:
            sample = dataset.read_row(number, row)
        except DataError as error:
            yield error
            continue
        where["key"] = sample.key
        try:
            found = check_sample(sample)
            first = int(entry["first_image"])
            expected = [tuple(size) for size in sizes[first : first + int(entry["num_images"])].tolist()]
            if found != expected:
                message = f"the index says {expected} of the images' sizes, they are {found}"
                raise DataError(message, reason=Reason.DAMAGED_SHARD)
            _check_processor(processor, sample.turns, found, sample.options)
            notes.add(
                str(dataset.shards[number].folder),
                Reason.SPECIAL_TOKENS_AS_TEXT,
                _special_tokens(processor, sample.turns),
            )
        except DataError as error:
            yield error.at(**where)
        else:
            yield sample.key
        yield from _check_label(sample.label, seen, where)


def _check_processor(
    processor: Processor | None,
    turns: Sequence[Turn],
    sizes: Sequence[tuple[int, int]],
    options: Mapping[str, Any] = NO_OPTIONS,
) -> None:
    if processor is not None:
        count = processor.count(turns, sizes, options)
        if count.reason:
            message = f"{count.reason}: {count.tokens} tokens, seq_length {processor.seq_length}, {len(sizes)} images"
            raise DataError(message, reason=count.reason)


def _special_tokens(processor: Processor | None, turns: Sequence[Turn]) -> Sequence[str]:
    return () if processor is None else processor.special_tokens(turns)


def _check_label(label: str, seen: dict[str, str], where: Mapping[str, Any]) -> Iterator[DataError]:
    """A second record with an ``id`` is a warning: ids are labels, what names a sample is source and number."""
    if label and label in seen:
        yield DataError(f"the id {label!r} is also that of {seen[label]}", reason=Reason.DUPLICATE_ID, **where)
    elif label:
        seen[label] = str(where["key"])
