"""What each optimizer step reads: a stream of rows of sample ids, a pure function of a few integers.

    (epoch, window) -> mixture -> ids, excluded ones left out -> rows (packing) or single samples (grouped)

A global batch takes the next items of the stream, across windows and epochs alike.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.config import Config
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.stream.mixture import Mixture
from megatron_vlm.data.stream.order import permute
from megatron_vlm.data.stream.packing import Costs, best_fit, deal, sample_costs


@dataclass(frozen=True, kw_only=True)
class DataState(Config):
    """Where a run stands in its data: the same few integers on every rank, whatever their number.

    Attributes:
        seed: of the order.
        epoch, window, item: the next item of the stream.
        consumed_samples: samples of all steps so far, holes included.
        digests: of what the stream depends on: ``data``, ``mixture``, ``processor``, ``excluded``, ``packing``.
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
    """One row to read: sample ids, the tokens each is planned with, and its place in the order.

    ``epoch`` keys augmentation; ``window`` and ``item`` say where the row's first item stands, for reports.
    """

    ids: tuple[int, ...]
    tokens: tuple[int, ...]
    epoch: int
    window: int = 0
    item: int = 0
    truncated: int = 0


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One optimizer step: this data parallel rank's rows, the ids of the whole global batch, the state after it."""

    rows: tuple[RowPlan, ...]
    sample_ids: tuple[int, ...]
    state: DataState


class Item(NamedTuple):
    """What cannot be divided between rows: a packed row, or one sample."""

    ids: list[int]
    tokens: list[int]
    cost: float
    truncated: int


_EXACT_WINDOWS = 256  # planned to count the rows of an epoch; more are estimated from these
Place = tuple[int, int, int, Item]  # epoch, window, number in the window


class Stream:
    """The items of all epochs, and the steps made of them.

    Args:
        counts: of samples: ids -> COUNT_DTYPE.
        mixture: the order. Without a seed, rows are not shuffled and samples not grouped either (evaluation).
        config: packing, seq_length, group_by.
        costs: of samples, by which rows are dealt to ranks: a pure function, of which neither the steps nor their state depend.
    """

    def __init__(
        self,
        counts: Callable[[NDArray[np.int64]], NDArray[Any]],
        mixture: Mixture,
        config: DataConfig,
        costs: Costs = sample_costs,
    ):
        self._counts, self._mixture, self._config, self._costs = counts, mixture, config, costs
        self.num_windows = mixture.num_windows
        self.window = lru_cache(maxsize=2)(self._window)

    def _window(self, epoch: int, window: int, group: int = 0, head: int = 0) -> list[Item]:
        """Returns the items of a window: rows if packing, else single samples.

        Args:
            group: samples of a global batch, for ``group_by``.
            head: samples at the start of the window that finish a global batch of the window before.
        """
        config, seed = self._config, self._mixture.seed
        ids = self._mixture.ids(epoch, window)
        counts = self._counts(ids)
        usable = counts["reason"] == 0
        ids, counts = ids[usable], counts[usable]
        tokens, patches = counts["tokens"].astype(np.int64), counts["patches"].astype(np.int64)
        costs = self._costs(counts)
        cut = counts["truncated"].astype(np.int64)
        key = f"{seed}/{epoch}/rows/{window}"
        if not config.packing:
            if config.group_by and seed is not None and group:
                image = counts["image_tokens"] > 0 if config.group_by == "modality" else np.zeros(len(ids), dtype=bool)
                order = grouped(tokens, image, group, head, key)
                ids, tokens, costs, cut = ids[order], tokens[order], costs[order], cut[order]
            rows = zip(ids.tolist(), tokens.tolist(), costs.tolist(), cut.tolist())
            return [Item([i], [n], cost, truncated) for i, n, cost, truncated in rows]
        packed = best_fit(tokens, config.seq_length, patches, config.max_patches_per_row)
        if seed is not None:  # best fit makes rows of long samples first
            packed = [packed[i] for i in permute(np.arange(len(packed), dtype=np.int64), len(packed), key).tolist()]
        # Numbers are taken out of numpy once for the window: one by one they cost more than the packing.
        flat = np.fromiter((i for row in packed for i in row), dtype=np.int64, count=len(ids))
        all_ids, all_tokens, all_costs, all_cut = (x[flat].tolist() for x in (ids, tokens, costs, cut))
        ends = list(accumulate(map(len, packed), initial=0))
        return [Item(all_ids[a:b], all_tokens[a:b], sum(all_costs[a:b]), sum(all_cut[a:b])) for a, b in pairwise(ends)]

    def count_samples(self) -> int | None:
        """Returns the usable samples of the first epoch; None if it has too many windows to go through."""
        if self.num_windows > _EXACT_WINDOWS:
            return None
        return sum(int((self._counts(self._mixture.ids(0, n))["reason"] == 0).sum()) for n in range(self.num_windows))

    def count_rows(self) -> int:
        """Returns the packed rows of the first epoch (others differ by a row or so a window).

        Beyond 256 windows they are estimated from 256 that are spread over the epoch.
        """
        planned = min(self.num_windows, _EXACT_WINDOWS)
        rows = sum(len(self.window(0, n * self.num_windows // planned)) for n in range(planned))
        return round(rows * self.num_windows / planned)

    def items(self, epoch: int = 0, window: int = 0, item: int = 0, group: int = 0) -> Iterator[Place]:
        """Yields (epoch, window, item number, item) without end, from the given place on, which starts a global batch
        of ``group`` samples."""
        head = item % group if group else 0
        while True:
            while window < self.num_windows:
                plan = self.window(epoch, window, group, head)
                for number in range(item, len(plan)):
                    yield epoch, window, number, plan[number]
                head = (head - len(plan)) % group if group else 0
                window, item = window + 1, 0
            epoch, window = epoch + 1, 0

    def steps(
        self, state: DataState, *, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> Iterator[StepPlan]:
        """Yields the steps after ``state``; the ids of a step do not depend on ``dp_size``."""
        group = global_batch_size if self._config.group_by else 0
        stream = self.items(state.epoch, state.window, state.item, group)
        while True:
            batch = [next(stream) for _ in range(global_batch_size)]
            epoch, window, number, _ = batch[-1]
            ids = tuple(i for *_, item in batch for i in item.ids)
            consumed = state.consumed_samples + len(ids)
            state = state.replace(epoch=epoch, window=window, item=number + 1, consumed_samples=consumed)
            rows = [batch[i : i + micro_batch_size] for i in range(0, len(batch), micro_batch_size)]
            mine = deal([sum(item.cost for *_, item in row) for row in rows], dp_size)[dp_rank]
            yield StepPlan(rows=tuple(row_plan(rows[i]) for i in mine), sample_ids=ids, state=state)


def grouped(tokens: NDArray[np.int64], image: NDArray[np.bool_], group: int, head: int, key: str) -> NDArray[np.int64]:
    """Returns an order (int64 indices) in which each ``group`` samples are alike, after the first ``head``.

    Samples with and without an image stay apart; within each kind, groups are made of neighbours in length. Groups come in
    random order; what is left of the kinds comes last.
    """
    order = np.arange(len(tokens), dtype=np.int64)
    groups, left = [], []
    for kind in (order[head:][image[head:]], order[head:][~image[head:]]):
        whole = len(kind) // group * group
        alike = kind[:whole][np.argsort(-tokens[kind[:whole]], kind="stable")]
        groups += np.split(alike, whole // group) if whole else []
        left.append(kind[whole:])
    shuffled = permute(np.arange(len(groups), dtype=np.int64), len(groups), key).tolist()
    return np.concatenate([order[:head], *(groups[i] for i in shuffled), *left])


def row_plan(row: Sequence[Place]) -> RowPlan:
    """Joins the items of a row."""
    epoch, window, number, _ = row[0]
    return RowPlan(
        ids=tuple(i for *_, item in row for i in item.ids),
        tokens=tuple(n for *_, item in row for n in item.tokens),
        epoch=epoch,
        window=window,
        item=number,
        truncated=sum(item.truncated for *_, item in row),
    )
