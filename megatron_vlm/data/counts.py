"""Token counts of every sample for one processor: what planning reads instead of the samples.

    text and image sizes of each sample --count--> SHARD.FINGERPRINT.tokens.npy, beside the shard or in a cache

They are made once per processor fingerprint. Several processes may do it at the same time: each starts with another
shard, skips what exists by then, and puts its file in place with a rename.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import uuid
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.dataset import MAX_OPEN, Dataset, Recent
from megatron_vlm.data.types import Processor
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.log import get_logger

LOGGER = get_logger(__name__)
UNREADABLE = "unreadable"
MANY = 20_000  # samples worth starting processes for: counting takes about a millisecond each
# Why a sample is excluded, by the code kept on disk: append only.
REASONS = (
    "",
    "too_long",
    "nothing_supervised",
    "placeholders",
    "max_image_num",
    "control_tokens",
    UNREADABLE,
    "image_too_small",
)
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
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.dataset = dataset
        self._fingerprint = processor.fingerprint[:16]
        self._cache = Path(cache_dir or os.path.expanduser("~/.cache/megatron_vlm"))
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
        self._open = Recent(self._load, MAX_OPEN)

    def __call__(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        """Returns the counts (``COUNT_DTYPE``) of samples."""
        out = np.empty(len(ids), dtype=COUNT_DTYPE)
        shards, rows = self.dataset.locate(ids)
        order = np.argsort(shards, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            if part.size:
                out[part] = self._open(int(shards[part[0]]))[rows[part]]
        return out

    def shard(self, shard: int) -> NDArray[Any]:
        """Returns the counts of one shard."""
        return self._open(shard)

    def _places(self, shard: int) -> tuple[Path, Path]:
        info = self.dataset.shards[shard]
        name = f"{info.path.stem}.{self._fingerprint}.tokens.npy"
        return info.path.with_name(name), self._cache / info.sha256[:16] / name

    def _find(self, shard: int) -> Path | None:
        for path in self._places(shard):
            if path.is_file():
                try:
                    _check(np.load(path, mmap_mode="r", allow_pickle=False), self.dataset.shards[shard].num_samples)
                    return path
                except (OSError, ValueError, EOFError) as error:
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
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("wb") as file:
                    np.save(file, counts, allow_pickle=False)
                os.replace(temporary, path)
                return path
            except OSError as error:
                errors.append(f"{path}: {error.strerror}")
                with contextlib.suppress(OSError):
                    temporary.unlink()
        raise ConfigError(
            f"cannot write token counts ({'; '.join(errors)}): set data.cache_dir to a folder that can be written"
        )

    def _load(self, shard: int) -> NDArray[Any]:
        return np.load(self._paths[shard], mmap_mode="r", allow_pickle=False)


_job: list[Any] = []  # (dataset, processor) of a counting process: sent once, not with every shard


def _set_job(*job: Any) -> None:
    _job[:] = job


def _count_job(shard: int) -> NDArray[Any]:
    dataset, processor = _job
    return count_shard(dataset, shard, processor)


def count_shard(dataset: Dataset, shard: int, processor: Processor) -> NDArray[Any]:
    """Counts the samples of one shard from their text and image sizes (``COUNT_DTYPE``)."""
    index, sizes = dataset.index(shard), dataset.image_sizes(shard).tolist()
    counts = np.zeros(len(index), dtype=COUNT_DTYPE)
    for row, entry in enumerate(index):
        first, number = int(entry["first_image"]), int(entry["num_images"])
        try:
            sample = dataset.read_text(shard, row)
        except DataError as error:
            LOGGER.warning("%s", error)
            counts[row]["reason"] = REASONS.index(UNREADABLE)
            continue
        of_images = [(width, height) for width, height in sizes[first : first + number]]
        count = processor.count(sample.turns, of_images, sample.options)
        reason = REASONS.index(count.reason)
        counts[row] = (count.tokens, count.supervised, count.image_tokens, count.patches, reason, count.truncated)
    return counts


def survey(counts: TokenCounts, config: DataConfig, output_dir: Path | None) -> dict[str, Any]:
    """Goes over all counts once: totals, what is excluded and why, and whether the policies allow it.

    Args:
        counts: of all samples.
        config: ``on_too_long``, ``on_bad_sample``.
        output_dir: gets ``excluded.jsonl``, a line per excluded sample; None: not written.

    Returns:
        ``samples``, ``excluded`` {reason: number}, ``excluded_digest``, ``truncated``, and ``tokens`` and
        ``supervised_tokens`` of the samples that are used.

    Raises:
        DataError: samples that ``raise`` policies refuse (the first ones named), or nothing usable.
    """
    dataset = counts.dataset
    report: dict[str, Any] = {
        "samples": len(dataset),
        "excluded": {},
        "truncated": 0,
        "tokens": 0,
        "supervised_tokens": 0,
    }
    digest = hashlib.sha256()
    lines: list[tuple[int, int, str, int]] = []  # shard, row, reason, tokens
    for shard in range(len(dataset.shards)):
        table = counts.shard(shard)
        digest.update(np.ascontiguousarray(table["reason"]).tobytes())
        usable = table["reason"] == 0
        report["truncated"] += int((table["truncated"][usable] != 0).sum())
        report["tokens"] += int(table["tokens"][usable].sum(dtype=np.int64))
        report["supervised_tokens"] += int(table["supervised"][usable].sum(dtype=np.int64))
        for row in np.flatnonzero(~usable).tolist():
            reason = REASONS[table["reason"][row]]
            report["excluded"][reason] = report["excluded"].get(reason, 0) + 1
            lines.append((shard, row, reason, int(table["tokens"][row])))
    report["excluded_digest"] = digest.hexdigest()[:32]
    for policy, reason, advice in (
        (config.on_too_long, "too_long", f"have more than {config.seq_length} tokens: raise data.seq_length, or set "
         "data.on_too_long to truncate or drop"),
        (config.on_bad_sample, UNREADABLE, "cannot be read: build the folder again, or set data.on_bad_sample to skip"),
    ):  # fmt: skip
        refused = [line for line in lines if line[2] == reason]
        if policy == "raise" and refused:
            names = ", ".join(_describe(dataset, *line) for line in refused[:5])
            more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
            raise DataError(f"{len(refused)} of {len(dataset)} samples {advice}. They are {names}{more}")
    if output_dir is not None:
        _write_excluded(dataset, lines, output_dir / "excluded.jsonl")
    if report["excluded"]:
        LOGGER.warning("%d of %d samples are excluded: %s", len(lines), len(dataset), report["excluded"])
    if report["truncated"]:
        LOGGER.warning(
            "%d of %d samples are truncated to %d tokens", report["truncated"], len(dataset), config.seq_length
        )
    if len(lines) == len(dataset):
        raise DataError(f"none of the {len(dataset)} samples can be used: {report['excluded']}")
    return report


def _describe(dataset: Dataset, shard: int, row: int, reason: str, tokens: int) -> str:
    try:
        key = dataset.read_text(shard, row).key
    except DataError:
        key = f"row {row} of {dataset.shards[shard].path}"
    return f"{key} ({tokens} tokens)" if tokens else key


def _write_excluded(dataset: Dataset, lines: list[tuple[int, int, str, int]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with temporary.open("w", encoding="utf-8") as file:
        for shard, row, reason, tokens in lines:
            line = {
                "sample": _describe(dataset, shard, row, reason, 0),
                "shard": str(dataset.shards[shard].path),
                "offset": int(dataset.index(shard)[row]["offset"]),
                "reason": reason,
                "tokens": tokens,
            }
            file.write(json.dumps(line) + "\n")
    os.replace(temporary, path)


def _check(counts: NDArray[Any], length: int) -> None:
    if counts.dtype != COUNT_DTYPE or len(counts) != length:
        raise ValueError(f"{len(counts)} rows of {counts.dtype}, expected {length} of {COUNT_DTYPE}")


def digest_of(text: str) -> str:
    """Returns a short hex digest, for the data state."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
