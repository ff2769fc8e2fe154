"""What each optimizer step reads: a stream of rows of sample ids, a pure function of a few integers.

    epoch -> windows of positions -> order() -> ids, excluded ones left out -> rows (packing) or single samples

A global batch takes the next items of the stream, across windows and epochs alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.config import Config
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.counts import TokenCounts
from megatron_vlm.data.order import Order, permute
from megatron_vlm.data.packing import best_fit, deal, row_cost


@dataclass(frozen=True, kw_only=True)
class DataState(Config):
    """Where a run stands in its data: the same few integers on every rank, whatever their number.

    Attributes:
        seed: of the order.
        epoch, window, item: the next item of the stream.
        consumed_samples: samples of all steps so far, holes included.
        digests: of what the stream depends on: ``data``, ``processor``, ``excluded``, ``packing``.
    """

    version: int = 1
    seed: int
    epoch: int = 0
    window: int = 0
    item: int = 0
    consumed_samples: int = 0
    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """One row to read: sample ids, the tokens each is planned with, and the epoch (for keyed augmentation)."""

    ids: tuple[int, ...]
    tokens: tuple[int, ...]
    epoch: int
    truncated: int


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One optimizer step: this data parallel rank's rows, the ids of the whole global batch, the state after it."""

    rows: tuple[RowPlan, ...]
    sample_ids: tuple[int, ...]
    state: DataState


@dataclass(frozen=True, kw_only=True)
class _Item:
    ids: NDArray[np.int64]
    counts: NDArray[Any]


class Stream:
    """The items of all epochs, and the steps made of them.

    Args:
        counts: of all samples.
        seed: of the order; None: samples come as they lie in the shards, and rows are not shuffled (evaluation).
        config: packing, seq_length, windows and slices.
    """

    def __init__(self, counts: TokenCounts, seed: int | None, config: DataConfig):
        self._counts, self._seed, self._config = counts, seed, config
        self.num_samples = len(counts.dataset)
        self.num_windows = -(-self.num_samples // config.packing_window)
        self._order = Order(
            num_samples=self.num_samples,
            seed=seed or 0,
            slice_size=config.slice_size,
            window_slices=config.window_slices,
        )
        self.window = lru_cache(maxsize=2)(self._window)

    def _window(self, epoch: int, window: int) -> list[_Item]:
        """Returns the items of a window: rows if packing, else single samples."""
        size = self._config.packing_window
        ids = np.arange(window * size, min(self.num_samples, (window + 1) * size), dtype=np.int64)
        if self._seed is not None:
            ids = self._order(epoch, ids)
        counts = self._counts(ids)
        usable = counts["reason"] == 0
        ids, counts = ids[usable], counts[usable]
        if not self._config.packing:
            return [_Item(ids=ids[i : i + 1], counts=counts[i : i + 1]) for i in range(len(ids))]
        rows = best_fit(counts["tokens"].astype(np.int64), self._config.seq_length)
        if self._seed is not None:  # best fit makes rows of long samples first
            key = f"{self._seed}/{epoch}/rows/{window}"
            rows = [rows[i] for i in permute(np.arange(len(rows), dtype=np.int64), len(rows), key).tolist()]
        return [_Item(ids=ids[row], counts=counts[row]) for row in rows]

    def items(self, epoch: int = 0, window: int = 0, item: int = 0) -> Iterator[tuple[int, int, int, _Item]]:
        """Yields (epoch, window, item number, item) without end, from the given place on."""
        while True:
            while window < self.num_windows:
                plan = self.window(epoch, window)
                for number in range(item, len(plan)):
                    yield epoch, window, number, plan[number]
                window, item = window + 1, 0
            epoch, window = epoch + 1, 0

    def steps(
        self, state: DataState, *, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> Iterator[StepPlan]:
        """Yields the steps after ``state``; the ids of a step do not depend on ``dp_size``."""
        stream = self.items(state.epoch, state.window, state.item)
        while True:
            batch = [next(stream) for _ in range(global_batch_size)]
            epoch, window, number, _ = batch[-1]
            ids = tuple(int(i) for *_, item in batch for i in item.ids)
            consumed = state.consumed_samples + len(ids)
            state = state.replace(epoch=epoch, window=window, item=number + 1, consumed_samples=consumed)
            rows = [batch[i : i + micro_batch_size] for i in range(0, len(batch), micro_batch_size)]
            mine = deal([_cost(row) for row in rows], dp_size)[dp_rank]
            yield StepPlan(rows=tuple(row_plan(rows[i]) for i in mine), sample_ids=ids, state=state)


def row_plan(row: list[tuple[int, int, int, _Item]]) -> RowPlan:
    """Joins the items of a row."""
    return RowPlan(
        ids=tuple(int(i) for *_, item in row for i in item.ids),
        tokens=tuple(int(n) for *_, item in row for n in item.counts["tokens"]),
        epoch=row[0][0],
        truncated=sum(int(item.counts["truncated"].sum()) for *_, item in row),
    )


def _cost(row: list[tuple[int, int, int, _Item]]) -> float:
    return sum(row_cost(item.counts["tokens"].tolist(), item.counts["patches"].tolist()) for *_, item in row)
