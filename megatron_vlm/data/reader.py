"""Planned rows read and encoded, in this process or in workers, and what happens to bad samples.

A worker gets a RowPlan and gives back a row; it holds nothing but open files. Workers are spawned, not forked: a
training process has threads and device handles that do not survive a fork. They end with their parent, however it ends.
"""

import atexit
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.counts import digest_of
from megatron_vlm.data.dataset import Dataset
from megatron_vlm.data.images import decode_image
from megatron_vlm.data.plan import RowPlan
from megatron_vlm.data.types import EncodedSample, PackedRow, Processor, row_from_samples
from megatron_vlm.errors import DataError
from megatron_vlm.log import get_logger

LOGGER = get_logger(__name__)
BAD_RATE_OVER = 10_000  # samples that the bad-sample rate is taken over at least


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What comes back for one RowPlan: the row, which samples are sound and a record of each that is not, or an error."""

    row: PackedRow | None = None
    sound: tuple[bool, ...] = ()
    failures: tuple[dict[str, Any], ...] = ()
    error: DataError | None = None


class RowReader(torch.utils.data.Dataset):
    """Reads and encodes planned rows, in whichever process.

    Args:
        dataset: the samples.
        processor: of the model.
        seed: of the run, for keyed augmentation.
        config: ``on_bad_sample``.
        multiple_of, fill_to: length of every row, see ``row_from_samples``.
    """

    def __init__(
        self, dataset: Dataset, processor: Processor, config: DataConfig, *, seed: int, multiple_of: int, fill_to: int
    ):
        self._dataset, self._processor, self._seed = dataset, processor, seed
        self._skip = config.on_bad_sample == "skip"
        self._multiple_of, self._fill_to = multiple_of, fill_to

    def __getitem__(self, plan: RowPlan) -> Fetched:
        samples, failures, sound = [], [], []
        for sample_id, tokens in zip(plan.ids, plan.tokens):
            try:
                samples.append(self.sample(sample_id, tokens, plan.epoch))
                sound.append(True)
            except DataError as error:
                if not self._skip:  # returned, not raised: torch would rebuild it from the text of a traceback
                    return Fetched(error=error)
                where = {"key": error.key, "shard": error.shard, "offset": error.offset}
                sound.append(False)
                place = {"epoch": plan.epoch, "window": plan.window, "item": plan.item}
                failures.append({"id": sample_id, **place, **where, "reason": error.message})
        row = row_from_samples(
            samples,
            filler_token_id=self._processor.filler_token_id,
            multiple_of=self._multiple_of,
            fill_to=self._fill_to,
            holes=len(failures),
        )
        row = replace(row, truncated=plan.truncated)
        return Fetched(row=row, sound=tuple(sound), failures=tuple(failures))

    def sample(self, sample_id: int, tokens: int, epoch: int) -> EncodedSample:
        """Reads and encodes one sample that its plan gives ``tokens`` tokens.

        Raises:
            DataError: it cannot be read or encoded, or has another number of tokens.
        """
        shard, row = self._dataset.locate_one(sample_id)
        path, offset = str(self._dataset.shards[shard].path), int(self._dataset.index(shard)[row]["offset"])
        sample = self._dataset.read(sample_id)
        seed = int(digest_of(f"{self._seed}/{epoch}/{sample_id}")[:15], 16)
        try:
            images = [decode_image(data, f"image {n}") for data, n in zip(sample.images, sample.image_names)]
            encoded = self._processor.encode(sample.key, sample.turns, images, seed, sample.options)
            if len(encoded.input_ids) != tokens:
                raise DataError(
                    f"{len(encoded.input_ids)} tokens, its count says {tokens}: remove the token counts (.tokens.npy)"
                )
        except DataError as error:
            raise DataError(error.message, key=sample.key, shard=path, offset=offset) from error
        except Exception as error:  # a bug, not a bad sample: no policy hides it, but it gets a name
            raise RuntimeError(f"encoding sample {sample.key} of {path} failed: {error!r}") from error
        return encoded


class Rows(Iterator[Fetched]):
    """What ``reader`` makes of each plan, in order, from ``config.num_workers`` processes (0: this one).

    ``close`` ends the processes; it is called at the end of the program if nobody else does.
    """

    def __init__(self, reader: RowReader, plans: Iterable[RowPlan], config: DataConfig):
        self._workers: set[BaseProcess] = set()
        self._items: Iterator[Any] | None = None
        if config.num_workers == 0:
            self._items = ((reader[plan], ()) for plan in plans)
            return
        loader = DataLoader(
            reader,
            sampler=plans,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=_flatten,  # type: ignore[arg-type]
            num_workers=config.num_workers,
            prefetch_factor=config.prefetch_rows,
            multiprocessing_context="spawn",
            worker_init_fn=_start_worker,
        )
        others = set(multiprocessing.active_children())
        self._items = iter(loader)
        self._workers = set(multiprocessing.active_children()) - others
        # multiprocessing would send its children a SIGTERM, which these do not heed, and wait.
        atexit.register(self.close)

    def __next__(self) -> Fetched:
        if self._items is None:
            raise StopIteration
        item, tensors = next(self._items)
        if item.error is not None:
            raise item.error
        return _restore(item, tensors) if tensors else item

    def close(self) -> None:
        """Ends the worker processes."""
        self._items = None  # torch asks them to end
        for worker in self._workers:
            worker.kill()
        atexit.unregister(self.close)


def _start_worker(_: int) -> None:
    """Leaves signals to the parent: a scheduler signals every process, and the parent needs rows to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


_FIELDS = ("input_ids", "position_ids", "labels", "cu_seqlens", "image_positions")


def _flatten(item: Fetched) -> tuple[Fetched, tuple[Tensor, ...]]:
    """Joins a row's tensors by dtype: each tensor that leaves a worker takes a file descriptor of shared memory."""
    row = item.row
    if row is None:
        return item, ()
    fields = [getattr(row, name) for name in _FIELDS]
    lengths = torch.tensor([len(f) for f in fields])
    shapes = torch.tensor([p.shape for p in row.pixels], dtype=torch.int64).reshape(-1, 3)
    pixels = torch.cat([p.reshape(-1) for p in row.pixels]) if row.pixels else torch.empty(0)
    none = torch.empty(0, dtype=torch.int64)
    bare = PackedRow(input_ids=none, position_ids=none, labels=none, cu_seqlens=none)
    bare = replace(bare, keys=row.keys, num_filler=row.num_filler, holes=row.holes, truncated=row.truncated)
    return replace(item, row=bare), (lengths, torch.cat([f.to(torch.int64) for f in fields]), shapes, pixels)


def _restore(item: Fetched, tensors: tuple[Tensor, ...]) -> Fetched:
    assert item.row is not None
    lengths, values, shapes, pixels = tensors
    ids, positions, labels, cu_seqlens, image_positions = values.split(lengths.tolist())
    parts = pixels.split(shapes.prod(1).tolist()) if len(shapes) else ()
    row = replace(
        item.row,
        input_ids=ids,
        position_ids=positions,
        labels=labels,
        cu_seqlens=cu_seqlens.to(torch.int32),
        image_positions=image_positions,
        pixels=tuple(part.view(*shape) for part, shape in zip(parts, shapes.tolist())),
    )
    return replace(item, row=row)


class Quarantine:
    """Counts holes, writes ``quarantine.jsonl`` and stops a run whose data is worse than the budget."""

    def __init__(self, config: DataConfig, output_dir: str | Path | None):
        self._config = config
        self._path = Path(output_dir) / "quarantine.jsonl" if output_dir else None
        self.holes = self._samples = self._row = self._worst = 0

    def add(self, item: Fetched) -> None:
        """Takes note of one row.

        Raises:
            DataError: more holes than ``bad_sample_rate`` or ``bad_sample_consecutive`` allow.
        """
        self._samples += len(item.sound)
        self.holes += len(item.failures)
        for sound in item.sound:
            self._row = 0 if sound else self._row + 1
            self._worst = max(self._worst, self._row)
        for failure in item.failures:
            LOGGER.warning("a sample is skipped: %s", failure)
            if self._path is not None:
                line = json.dumps({"time": round(time.time(), 3), **failure}) + "\n"
                self._path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                try:
                    os.write(descriptor, line.encode())  # one write: ranks append to the same file
                finally:
                    os.close(descriptor)
        allowed = self._config.bad_sample_rate * max(self._samples, BAD_RATE_OVER)
        if self.holes > allowed or self._worst > self._config.bad_sample_consecutive:
            raise DataError(
                f"{self.holes} of {self._samples} samples could not be used, {self._worst} of them in a row: "
                f"data.bad_sample_rate {self._config.bad_sample_rate} and data.bad_sample_consecutive "
                f"{self._config.bad_sample_consecutive} allow fewer. They are listed in {self._path or 'the log'}; "
                "'megatron-vlm data check' names all of them"
            )
