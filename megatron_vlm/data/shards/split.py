"""Training and validation halves: seeded, and no image in both.

records --join those that share a group or an image--> components --keyed order--> val takes whole ones, up to F
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.data.formats import read_source
from megatron_vlm.data.formats.records import Record, RecordSource
from megatron_vlm.errors import ConfigError, DataError

CHUNK = 2**20


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """How a validation half is drawn.

    Attributes:
        fraction: of the records, at most.
        by: what stays together besides images: ``id``, ``image`` (nothing else), or a key of the records.
        seed: of the draw.
    """

    fraction: float
    by: str = "image"
    seed: int = 1234

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ConfigError(f"--val-fraction must lie between 0 and 1, got {self.fraction}")


class _Components:
    """Records joined by what they share (union-find)."""

    def __init__(self) -> None:
        self.parents: list[int] = []
        self.owners: dict[bytes, int] = {}

    def add(self, tokens: Sequence[bytes]) -> None:
        """Adds a record and joins it with the earlier ones that hold one of the tokens."""
        number = len(self.parents)
        self.parents.append(number)
        for token in tokens:
            other = self.owners.setdefault(token, number)
            roots = self.root(number), self.root(other)
            self.parents[max(roots)] = min(roots)

    def root(self, number: int) -> int:
        """Returns the first record of a record's component."""
        while self.parents[number] != number:
            self.parents[number] = self.parents[self.parents[number]]
            number = self.parents[number]
        return number


Halves = dict[tuple[int, str], dict[int, int]]


def assign(sources: Sequence[RecordSource], settings: SplitSettings) -> tuple[Halves, dict[str, Any]]:
    """Draws the validation half.

    Images are the same if their bytes are, whatever their paths, and so is a sample of a tar that several inputs name.

    Args:
        sources: all of them; read once more when the shards are written.
        settings: see SplitSettings.

    Returns:
        {(source, Record.file): {Record.number: 0 for training, 1 for validation}} and a report; both empty if no record can
        be used, of which the build says why.

    Raises:
        ConfigError: no record has the key, or nothing small enough is left for the validation half.
    """
    components, records, digests = _Components(), [], dict[str, bytes]()
    sizes: list[int] = []  # images of each record
    places: list[tuple[int, str, int]] = []
    grouped = 0
    for number, source in enumerate(sources):
        try:
            for record_number, value, record in read_source(source):
                if isinstance(record, DataError):
                    continue  # reported when the shards are written
                group = None if settings.by == "image" else value.get(settings.by)
                grouped += group is not None
                images = [_digest(source, image, digests) for image in _files(source, record)]
                tokens = [b"image" + digest for digest in images]
                if record.file and not images:  # nothing else would tell that it is the same
                    tokens.append(f"sample{record.number} of {record.file}".encode())
                components.add(tokens if group is None else [*tokens, f"group{group!r}".encode()])
                records.append((number, record_number))
                places.append((number, record.file, record.number))
                sizes.append(len(set(images)))
        except DataError:
            continue  # reported when the shards are written
    if not records:
        return {}, {}
    if settings.by != "image" and not grouped:
        raise ConfigError(f"--split-by {settings.by}: no record has this key")
    chosen, report = _draw(components, records, sizes, settings, grouped)
    halves: Halves = {}
    for index, (number, file, record_number) in enumerate(places):
        halves.setdefault((number, file), {})[record_number] = int(index in chosen)
    return halves, report


def _draw(
    components: _Components, records: list[tuple[int, int]], sizes: list[int], settings: SplitSettings, grouped: int
) -> tuple[set[int], dict[str, Any]]:
    """Returns which records are for validation, by their place in ``records``, and the report."""
    members: dict[int, list[int]] = {}
    for number in range(len(records)):
        members.setdefault(components.root(number), []).append(number)
    target = round(settings.fraction * len(records))

    def key(root: int) -> bytes:
        return hashlib.blake2b(f"{settings.seed}/{records[root]}".encode(), digest_size=8).digest()

    chosen: set[int] = set()
    for root in sorted(members, key=key):
        if len(chosen) + len(members[root]) <= target:
            chosen.update(members[root])
    largest = max(map(len, members.values()), default=0)
    if not chosen:
        raise ConfigError(
            f"--val-fraction {settings.fraction} of {len(records)} records is {target}, and what belongs together is "
            f"larger (the smallest group has {min(map(len, members.values()), default=0)} records): raise it"
        )
    report = {
        "fraction": settings.fraction,
        "by": settings.by,
        "seed": settings.seed,
        "records": {"train": len(records) - len(chosen), "val": len(chosen)},
        "realised_fraction": round(len(chosen) / len(records), 6),
        "components": len(members),
        "largest_component": largest,
        "without_key": 0 if settings.by == "image" else len(records) - grouped,
        "images_in_both": 0,
        "images_per_record": {
            half: round(sum(sizes[i] for i in range(len(records)) if (i in chosen) == flag) / max(1, number), 3)
            for half, flag, number in (("train", False, len(records) - len(chosen)), ("val", True, len(chosen)))
        },
    }
    return chosen, report


def _files(source: RecordSource, record: Record) -> list[str | bytes]:
    """What a record shows: its images, and its videos by their files (or the files of their folders)."""
    files = [image if isinstance(image, bytes) else str(Path(source.root, image)) for image in record.images]
    for video in record.videos:
        path = Path(source.root, video)
        files += sorted(map(str, path.iterdir())) if os.path.isdir(path) else [str(path)]
    return files


def _digest(source: RecordSource, image: str | bytes, digests: dict[str, bytes]) -> bytes:
    if isinstance(image, bytes):
        return hashlib.blake2b(image, digest_size=16).digest()
    if image not in digests:
        digest = hashlib.blake2b(digest_size=16)
        try:
            if not os.path.isfile(image):
                raise OSError("not a file")
            with open(image, "rb") as file:
                while block := file.read(CHUNK):
                    digest.update(block)
        except (OSError, ValueError):  # reported when the shards are written
            digest.update(image.encode("utf-8", "surrogatepass"))
        digests[image] = digest.digest()
    return digests[image]
