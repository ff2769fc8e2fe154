"""Checks a shard folder: files against the manifest, every sample read, every image decoded."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from megatron_vlm.data.dataset import Dataset, Shard
from megatron_vlm.data.shards import check_sample
from megatron_vlm.errors import DataError


def check_folder(folder: str | Path) -> Iterator[str | DataError]:
    """Yields the key of each sound sample and a DataError for each problem.

    A folder whose manifest cannot be read gives that one problem.
    """
    try:
        dataset = Dataset([folder])
    except DataError as error:
        yield error
        return
    try:
        for number, shard in enumerate(dataset.shards):
            if _sha256(shard) != shard.sha256:
                yield DataError("damaged: its sha256 differs from the manifest", shard=str(shard.path))
            yield from _check_shard(dataset, number)
    finally:
        dataset.close()


def _check_shard(dataset: Dataset, number: int) -> Iterator[str | DataError]:
    name = str(dataset.shards[number].path)
    try:
        index, sizes = dataset.index(number), dataset.image_sizes(number)
    except DataError as error:
        yield error
        return
    for row, entry in enumerate(index):
        where = {"shard": name, "offset": int(entry["offset"])}
        try:
            sample = dataset.read_row(number, row)
        except DataError as error:
            yield error
            continue
        try:
            found = check_sample(sample)
            first = int(entry["first_image"])
            expected = [tuple(size) for size in sizes[first : first + int(entry["num_images"])].tolist()]
            if found != expected:
                raise DataError(f"images of another size: {found}, the index says {expected}")
        except DataError as error:
            yield DataError(error.message, key=sample.key, **where)  # type: ignore[arg-type]
        else:
            yield sample.key


def _sha256(shard: Shard) -> str:
    with shard.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
