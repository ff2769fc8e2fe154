"""Token counts of every sample for one processor: what planning reads instead of the samples.

    text and image sizes of each sample --count--> SHARD.FINGERPRINT.tokens.npy, beside the shard or in a cache

They are made once per processor fingerprint, without a limit on length unless samples are truncated: limits are laid
on when they are read, so another ``seq_length`` counts nothing anew. Several processes may do it at the same time: each
starts with another shard, skips what exists by then, and puts its file in place with a rename.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.shards.dataset import MAX_OPEN, Dataset, read_table
from megatron_vlm.data.shards.writer import table_bytes
from megatron_vlm.data.stream.mixture import MixtureSource
from megatron_vlm.data.types import Processor
from megatron_vlm.errors import ConfigError, DataError, Reason
from megatron_vlm.files import expand_path, open_regular, synced_file, write_synced, writing
from megatron_vlm.log import get_logger

LOGGER = get_logger(__name__)
NO_LIMIT = 2**31 - 1
_CRC = 4  # bytes after the table
MANY = 20_000  # samples worth starting processes for: counting takes about a millisecond each
COUNT_DTYPE = np.dtype(
    [
        ("tokens", "<u4"),
        ("supervised", "<u4"),
        ("image_tokens", "<u4"),
        ("patches", "<u4"),
        ("reason", "u1"),
        ("truncated", "u1"),
    ]
)


class TokenCounts:
    """Counts of all samples of ``dataset`` under ``processor``.

    Args:
        dataset: the samples.
        processor: gives the fingerprint, and counts what is not counted yet.
        cache_dir: where counts go when a data folder is read-only.
        num_workers: processes to count with where there is much to count; 0: this one.
        max_patches: samples with more are excluded; None: no limit.
        rank, num_ranks: of processes that do this at the same time: each begins with its share of the shards.

    Raises:
        ConfigError: neither the data folder nor ``cache_dir`` can be written.
    """

    def __init__(
        self,
        dataset: Dataset,
        processor: Processor,
        *,
        cache_dir: str | Path | None = None,
        num_workers: int = 0,
        max_patches: int | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.dataset = dataset
        self._limits = {Reason.TOO_MANY_PATCHES: ("patches", max_patches or NO_LIMIT)}
        if not processor.truncate:
            self._limits[Reason.TOO_LONG] = ("tokens", processor.seq_length)
            processor = dataclasses.replace(processor, seq_length=NO_LIMIT)  # type: ignore[type-var]
        self._fingerprint = processor.fingerprint[:16]
        self._processor = processor
        self._cache = Path(cache_dir or expand_path("~/.cache/megatron_vlm"))
        self._paths: dict[int, Path] = {}
        number = len(dataset.shards)
        missing = []
        for step in range(number):
            shard = (rank * number // num_ranks + step) % number
            path = self._find(shard)
            if path is None:
                missing.append(shard)
            else:
                self._paths[shard] = path
        self._count(missing, processor, num_workers)
        self._open = functools.lru_cache(MAX_OPEN)(self._load)

    def __call__(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        """Returns the counts (``COUNT_DTYPE``) of samples."""
        out = np.empty(len(ids), dtype=COUNT_DTYPE)
        shards, rows = self.dataset.locate(ids)
        order = np.argsort(shards, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            if part.size:
                out[part] = self._open(int(shards[part[0]]))[rows[part]]
        return self._limit(out)

    def shard(self, shard: int) -> NDArray[Any]:
        """Returns the counts of one shard."""
        return self._limit(np.array(self._open(shard)))

    def _limit(self, counts: NDArray[Any]) -> NDArray[Any]:
        for reason, (field, most) in self._limits.items():
            counts["reason"][(counts["reason"] == 0) & (counts[field] > most)] = reason.number
        return counts

    def _places(self, shard: int) -> tuple[Path, Path]:
        info = self.dataset.shards[shard]
        path = info.beside(f".{self._fingerprint}.tokens.npy")
        return path, self._cache / info.identity[:16] / path.name

    def _find(self, shard: int) -> Path | None:
        for path in self._places(shard):
            if os.path.isfile(path):
                try:
                    read_table(path, COUNT_DTYPE, self.dataset.shards[shard].num_samples)
                    return path
                except DataError as error:
                    LOGGER.warning("token counts %s are counted again: %s", path, error)
        return None

    def _count(self, shards: list[int], processor: Processor, num_workers: int) -> None:
        """Counts shards, unless another process has by the time their turn comes."""
        samples = sum(self.dataset.shards[shard].num_samples for shard in shards)
        if samples >= MANY:
            LOGGER.info("counting the tokens of %d samples, once for these settings", samples)
        if samples < MANY or not num_workers:
            for shard in shards:
                self._paths[shard] = self._find(shard) or self._save(shard, count_shard(self.dataset, shard, processor))
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_workers, context, _set_job, (self.dataset, processor)) as pool:
            # A few at a time, so that what other ranks have counted meanwhile is not counted again.
            for start in range(0, len(shards), 2 * num_workers):
                group = shards[start : start + 2 * num_workers]
                found = {shard: path for shard in group if (path := self._find(shard)) is not None}
                self._paths.update(found)
                todo = [shard for shard in group if shard not in found]
                for shard, counts in zip(todo, pool.map(_count_job, todo)):
                    self._paths[shard] = self._save(shard, counts)

    def _save(self, shard: int, counts: NDArray[Any]) -> Path:
        errors = []
        for path in self._places(shard):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_synced(path, table_bytes(counts) + zlib.crc32(counts.tobytes()).to_bytes(_CRC, "little"))
                return path
            except OSError as error:
                errors.append(f"{path}: {error.strerror}")
        raise ConfigError(
            f"cannot write token counts ({'; '.join(errors)}): set data.cache_dir to a folder that can be written"
        )

    def _load(self, shard: int) -> NDArray[Any]:
        table = read_table(self._paths[shard], COUNT_DTYPE, self.dataset.shards[shard].num_samples)
        with open_regular(self._paths[shard], DataError) as file:
            file.seek(-_CRC, os.SEEK_END)
            sound = int.from_bytes(file.read(), "little") == zlib.crc32(table.tobytes())
        if sound:
            return table
        LOGGER.warning("token counts %s are counted again: damaged, their crc32 differs", self._paths[shard])
        table = count_shard(self.dataset, shard, self._processor)
        self._paths[shard] = self._save(shard, table)
        return table


_job: list[Any] = []  # (dataset, processor) of a counting process: sent once, not with every shard


def _set_job(*job: Any) -> None:
    _job[:] = job


def _count_job(shard: int) -> NDArray[Any]:
    dataset, processor = _job
    return count_shard(dataset, shard, processor)


def count_shard(
    dataset: Dataset, shard: int, processor: Processor, rows: NDArray[np.int64] | None = None
) -> NDArray[Any]:
    """Counts samples of one shard from their text and image sizes (``COUNT_DTYPE``); ``rows``: which, None: all."""
    index, sizes = dataset.index(shard), dataset.image_sizes(shard)
    rows = np.arange(len(index)) if rows is None else rows
    counts = np.zeros(len(rows), dtype=COUNT_DTYPE)
    for place, row in enumerate(rows.tolist()):
        first, number = int(index[row]["first_image"]), int(index[row]["num_images"])
        try:
            sample = dataset.read_text(shard, row)
        except DataError as error:
            LOGGER.warning("%s", error)
            counts[place]["reason"] = Reason.UNREADABLE.number
            continue
        of_images = [(width, height) for width, height in sizes[first : first + number].tolist()]
        count = processor.count(sample.turns, of_images, sample.options)
        counts[place] = (
            count.tokens, count.supervised, count.image_tokens, count.patches, count.reason.number, count.truncated
        )  # fmt: skip
    return counts


def survey(
    counts: TokenCounts, config: DataConfig, output_dir: Path | None, sources: Sequence[MixtureSource] = ()
) -> dict[str, Any]:
    """Goes over all counts once: totals, what is excluded and why, and whether the policies allow it.

    Args:
        counts: of all samples.
        config: ``on_too_long``, ``on_bad_sample``.
        output_dir: gets ``excluded.jsonl``, a line per excluded sample; None: not written.
        sources: what to report in ``mixture``, covering all samples.

    Returns:
        ``samples``, ``excluded`` {reason: number}, ``excluded_digest``, ``truncated``, ``tokens`` and
        ``supervised_tokens`` of the samples that are used, and ``mixture``: see ``shares``.

    Raises:
        DataError: samples that ``raise`` policies refuse (the first ones named), or nothing usable.
        ConfigError: ``excluded.jsonl`` cannot be written.
    """
    dataset = counts.dataset
    report: dict[str, Any] = {"samples": len(dataset), "excluded": {}, "truncated": 0, "tokens": 0}
    report["supervised_tokens"] = 0
    digest = hashlib.sha256()
    # The first few of each.
    refused: dict[Reason, list[str]] = {
        reason: [] for reason in (Reason.TOO_LONG, Reason.TOO_MANY_PATCHES, Reason.UNREADABLE)
    }
    firsts = np.array([source.first for source in sources], dtype=np.int64)
    used = np.zeros((2, len(sources)), dtype=np.int64)  # usable samples and their tokens
    path = None if output_dir is None else output_dir / "excluded.jsonl"
    with _listing(path) as file:
        for shard in range(len(dataset.shards)):
            table = counts.shard(shard)
            digest.update(np.ascontiguousarray(table["reason"]).tobytes())
            usable = table["reason"] == 0
            report["truncated"] += int((table["truncated"][usable] != 0).sum())
            report["tokens"] += int(table["tokens"][usable].sum(dtype=np.int64))
            report["supervised_tokens"] += int(table["supervised"][usable].sum(dtype=np.int64))
            if sources:
                ids = dataset.first_id(shard) + np.flatnonzero(usable)
                which = np.searchsorted(firsts, ids, side="right") - 1
                used[0] += np.bincount(which, minlength=len(sources))
                used[1] += np.bincount(which, table["tokens"][usable], len(sources)).astype(np.int64)
            for row in np.flatnonzero(~usable).tolist():
                reason, tokens = Reason.numbered(int(table["reason"][row])), int(table["tokens"][row])
                report["excluded"][reason.text] = report["excluded"].get(reason.text, 0) + 1
                if len(refused.get(reason, "12345")) < 5:
                    refused[reason].append(_describe(dataset, shard, row, tokens))
                if file is not None:
                    file.write(json.dumps(_excluded_line(dataset, shard, row, reason, tokens)).encode() + b"\n")
    report["excluded_digest"] = digest.hexdigest()[:32]
    _refuse(report, refused, config)  # once they are listed, to be looked at
    if report["excluded"]:
        number = sum(report["excluded"].values())
        listed = "" if path is None else f"; all are listed in {path}"
        LOGGER.warning("%d of %d samples are excluded: %s%s", number, len(dataset), report["excluded"], listed)
    if report["truncated"]:
        LOGGER.warning(
            "%d of %d samples are truncated to %d tokens", report["truncated"], len(dataset), config.seq_length
        )
    if sum(report["excluded"].values()) == len(dataset):
        raise DataError(f"none of the {len(dataset)} samples can be used: {report['excluded']}")
    if sources:
        report["mixture"] = shares(sources, *used.tolist())
        if not sum(source["samples"] for source in report["mixture"].values()):
            raise DataError(f"none of the samples that an epoch reads can be used: {report['excluded']}")
    return report


def shares(
    sources: Sequence[MixtureSource], usable: Sequence[int], tokens: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Returns what an epoch reads of each source, by name.

    Args:
        sources: of the mixture.
        usable, tokens: usable samples of each source, and their tokens.

    Returns:
        ``per_epoch`` (asked for), ``repeat``, ``samples`` (used) and ``tokens``, means over epochs, and the shares of all
        ``sample_share`` and ``token_share``.
    """
    rows = {}
    for source, number, amount in zip(sources, usable, tokens):
        repeat = Fraction(source.per_epoch) / source.samples
        rows[source.name] = {
            "per_epoch": _short(source.per_epoch),
            "repeat": round(float(repeat), 6),
            "samples": _short(number * repeat),
            "tokens": round(amount * repeat),
        }
    for name in ("sample", "token"):
        total = sum(row[f"{name}s"] for row in rows.values()) or 1
        for row in rows.values():
            row[f"{name}_share"] = round(row[f"{name}s"] / total, 6)
    return rows


def check_share(report: Mapping[str, Any], config: DataConfig, listed: Path | None = None) -> None:
    """Stops a run before it trains on what is left of bad data.

    Args:
        report: of ``survey``.
        config: ``max_bad_fraction``.
        listed: the file that names every excluded sample.

    Raises:
        DataError: more samples cannot be used than the setting allows; those that a limit of the run leaves out do not count.
    """
    asked = {reason.text for reason in Reason if reason.asked_for}
    bad = {reason: number for reason, number in report["excluded"].items() if reason not in asked}
    number, total = sum(bad.values()), report["samples"]
    if number > config.max_bad_fraction * total:
        reasons = ", ".join(f"{count} {reason}" for reason, count in bad.items())
        raise DataError(
            f"{number} of {total} samples cannot be used ({reasons}), {number / total:.1%}, and data.max_bad_fraction allows "
            f"{config.max_bad_fraction:.1%}: correct them, or raise it"
            + (f"; all are listed in {listed}" if listed else "")
        )


def _short(number: Fraction | int) -> float:
    """Returns whole numbers as such, others to 2 digits after the point, or as many as a small one needs."""
    if number % 1 == 0:
        return int(number)
    return round(float(number), 2) if number >= 1 else float(f"{float(number):.2g}")


def _refuse(report: dict[str, Any], refused: dict[Reason, list[str]], config: DataConfig) -> None:
    advice = {
        Reason.TOO_LONG: f"have more than {config.seq_length} tokens: raise data.seq_length, or set data.on_too_long to "
        "truncate or drop",
        Reason.TOO_MANY_PATCHES: f"have more than {config.max_patches_per_row} image patches: raise "
        "data.max_patches_per_row, or set data.on_too_long to drop",
        Reason.UNREADABLE: "cannot be read: build the folder again, or set data.on_bad_sample to skip",
    }
    for reason, names in refused.items():
        policy = config.on_bad_sample if reason is Reason.UNREADABLE else config.on_too_long
        if policy == "raise" and names:
            number = report["excluded"][reason.text]
            more = f" and {number - len(names)} more" if number > len(names) else ""
            all_ = report["samples"]
            raise DataError(f"{number} of {all_} samples {advice[reason]}. They are {', '.join(names)}{more}")


def _describe(dataset: Dataset, shard: int, row: int, tokens: int) -> str:
    name = sample_name(dataset, shard, row)
    return f"{name} ({tokens} tokens)" if tokens else name


def sample_name(dataset: Dataset, shard: int, row: int) -> str:
    """Returns the key of a sample, or its place where it cannot be read."""
    try:
        return dataset.read_text(shard, row).key
    except DataError:
        return f"row {row} of {dataset.shards[shard].path}"


def _excluded_line(dataset: Dataset, shard: int, row: int, reason: Reason, tokens: int) -> dict[str, Any]:
    return {
        "sample": sample_name(dataset, shard, row),
        "shard": str(dataset.shards[shard].path),
        "offset": int(dataset.index(shard)[row]["offset"]),
        "reason": reason.text,
        "tokens": tokens,
    }


@contextlib.contextmanager
def _listing(path: Path | None) -> Iterator[IO[bytes] | None]:
    """Opens the list of excluded samples, which appears whole; None: there is none."""
    if path is None:
        yield None
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with synced_file(path) as file:
            yield file


def digest_of(text: str) -> str:
    """Returns a short hex digest, for the data state."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
