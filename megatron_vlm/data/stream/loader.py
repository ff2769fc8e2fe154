"""Rows for training and evaluation: plan -> workers that read and encode -> Row, with a state of a few integers.

    Stream.steps(state) --RowPlan--> worker processes: read, decode, encode, lay end to end --> StepRows

Workers hold no state, so neither their number nor what they have prefetched shows in the rows or in the data state.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.data.config import DataConfig, SourceConfig
from megatron_vlm.data.row import Row
from megatron_vlm.data.shards.dataset import Dataset
from megatron_vlm.data.stream.counts import TokenCounts, digest_of, survey
from megatron_vlm.data.stream.mixture import Mixture, MixtureSource, resolve
from megatron_vlm.data.stream.packing import Costs, sample_costs
from megatron_vlm.data.stream.reader import Quarantine, RowReader
from megatron_vlm.data.stream.step_plan import DataState, RowPlan, StepPlan, Stream, row_plan
from megatron_vlm.data.stream.workers import RowWorkers
from megatron_vlm.data.types import Processor
from megatron_vlm.errors import ConfigError
from megatron_vlm.log import get_logger

LOGGER = get_logger(__name__)
FEW = 500  # held-out samples that are not worth starting worker processes for


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """One optimizer step.

    Attributes:
        rows: this data parallel rank's microbatches; as many on every rank.
        state: of the data after this step; keep it once the step is committed.
        sample_ids: ids of the whole global batch.
        num_samples: their number, holes included.
    """

    rows: tuple[Row, ...]
    state: DataState
    sample_ids: tuple[int, ...]
    num_samples: int


class RowLoader:
    """The training rows of one data parallel rank, without end.

    Args:
        config: see DataConfig.
        processor: of the model.
        paths: shard folders, or how much of each an epoch reads as well.
        seed: of the order.
        global_batch_size: rows a step if packing, else samples.
        micro_batch_size: samples a row; 1 if packing.
        dp_rank, dp_size: of this rank.
        multiple_of, fill_to: length of every row, see ``row_from_samples``.
        state: continue after it; None: from the start.
        cache_dir: see ``DataConfig.cache_dir``, which it overrides.
        output_dir: gets ``excluded.jsonl`` and ``quarantine.jsonl``.
        costs: see Stream.

    Attributes:
        samples_per_epoch: samples that an epoch trains on in the mean, excluded ones left out.

    Raises:
        ConfigError: sizes that do not divide, or a state of other data (unless ``allow_data_change``).
        DataError: unreadable data, or samples that are too long under ``on_too_long: raise``.
    """

    def __init__(
        self,
        config: DataConfig,
        processor: Processor,
        *,
        paths: Sequence[SourceConfig | str | Path],
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        multiple_of: int = 1,
        fill_to: int = 0,
        state: DataState | None = None,
        cache_dir: str | Path | None = None,
        output_dir: str | Path | None = None,
        costs: Costs = sample_costs,
    ):
        check_batch(config, global_batch_size, micro_batch_size, dp_size)
        check_rows(config, micro_batch_size, multiple_of, fill_to)
        self._config, self._batch = config, global_batch_size
        whose = dict(rank=dp_rank, num_ranks=dp_size)
        opened = open_data(config, processor, paths, seed=seed, cache_dir=cache_dir, costs=costs, **whose)
        self._dataset, self._mixture, self._stream = opened.dataset, opened.mixture, opened.stream
        report_dir = Path(output_dir) if output_dir and dp_rank == 0 else None
        self._report = survey(opened.counts, config, report_dir, self._mixture.sources)
        self.samples_per_epoch = self._count_samples()
        state = self._start(seed, processor, state)
        self._ready: deque[StepPlan] = deque()
        steps = self._stream.steps(
            state,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
        )
        reader = RowReader(self._dataset, processor, config, seed=seed, multiple_of=multiple_of, fill_to=fill_to)
        self._rows = RowWorkers(reader, self._queue(steps), config)
        self._quarantine = Quarantine(config, output_dir)

    def _start(self, seed: int, processor: Processor, state: DataState | None) -> DataState:
        digests = {
            "data": self._dataset.digest,
            "mixture": self._mixture.digest,
            "processor": processor.fingerprint[:32],
            "excluded": self._report["excluded_digest"],
            "packing": _packing_digest(self._config, self._batch),
        }
        if state is None:
            return DataState(seed=seed, digests=digests)
        changed = [name for name in digests if state.digests.get(name) != digests[name]]
        changed += ["seed"] if state.seed != seed else []
        if changed and not self._config.allow_data_change:
            raise ConfigError(
                f"the checkpoint was trained on other data: {', '.join(changed)} changed, so its place in the order "
                "means nothing here. Restore them, set data.allow_data_change=true to go on anyway (the way where only the "
                "processor changed, by a newer version of this package), or checkpoint.finetune=true to start the data anew"
            )
        if changed:
            LOGGER.warning(
                "resuming although %s changed: samples may repeat or be missed this epoch", ", ".join(changed)
            )
        return state.replace(seed=seed, digests=digests)

    def _queue(self, steps: Iterator[StepPlan]) -> Iterator[RowPlan]:
        for step in steps:
            self._ready.append(step)
            yield from step.rows

    def next_step(self) -> StepRows:
        """Returns the next step.

        Raises:
            DataError: a bad sample under ``on_bad_sample: raise``, or more holes than the budget.
        """
        fetched = [next(self._rows)]
        step = self._ready.popleft()
        fetched += [next(self._rows) for _ in step.rows[1:]]
        for item in fetched:
            self._quarantine.add(item)
        rows = tuple(item.row for item in fetched if item.row is not None)
        return StepRows(rows=rows, state=step.state, sample_ids=step.sample_ids, num_samples=len(step.sample_ids))

    @property
    def source_starts(self) -> list[int]:
        """First sample id of each source, in the order of ``report()["mixture"]``."""
        return [source.first for source in self._mixture.sources]

    def _count_samples(self) -> float:
        """Counts what an epoch reads of each source but the excluded ones.

        Where that differs between epochs (part of a source, and some of it excluded) it is the first epoch's, or the mean if
        the first one is too long to go through.
        """
        partly = self._report["excluded"] and any(s.per_epoch % s.samples for s in self._mixture.sources)
        if partly and (number := self._stream.count_samples()) is not None:
            return number
        return sum(source["samples"] for source in self._report["mixture"].values())

    def samples_in(self, epochs: float) -> float:
        """Returns the samples that the first ``epochs`` epochs train on; shares that are no whole numbers make epochs differ."""
        if epochs % 1 or self._report["excluded"]:
            return epochs * self.samples_per_epoch
        return self._mixture.num_positions(int(epochs))

    def steps_per_epoch(self, epochs: float = 1.0) -> int:
        """Returns the steps after which ``epochs`` epochs have been read; the last one may reach into the next epoch.

        With packing, they are ``Stream.count_rows``'s. The same on every rank.
        """
        items = epochs * self._stream.count_rows() if self._config.packing else self.samples_in(epochs)
        return max(1, math.ceil(items / self._batch - 1e-9))  # epochs may be a quotient: 96 / 97 x 97 > 96

    def require_all(self, steps: int, epochs: float | None) -> None:
        """Refuses sources of which a run reads nothing, even if its last epoch were whole.

        Args:
            steps: of the run.
            epochs: of the run, where it is as long as these.

        Raises:
            ConfigError: their names, sizes and shares.
        """
        if all(source.per_epoch >= 1 for source in self._mixture.sources):
            return  # rows are not counted, which takes a while where they are packed
        if epochs is None:
            items = self._stream.count_rows() if self._config.packing else self.samples_per_epoch
            epochs = steps * self._batch / items
        self._mixture.require_all(max(1, math.ceil(epochs - 1e-9)))

    def report(self) -> dict[str, Any]:
        """Returns counts of samples, excluded (by reason), truncated and holes, and token totals."""
        return {**self._report, "holes": self._quarantine.holes}

    def close(self) -> None:
        """Ends the workers and closes the files."""
        self._rows.close()
        self._dataset.close()


def evaluation_rows(
    config: DataConfig,
    processor: Processor,
    *,
    paths: Sequence[str | Path],
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    multiple_of: int = 1,
    fill_to: int = 0,
    max_rows: int | None = None,
    cache_dir: str | Path | None = None,
    output_dir: str | Path | None = None,
) -> Iterator[Row]:
    """Yields this rank's held-out rows: every usable sample once over all ranks, in the order of the shards.

    Every rank gets the same number of rows: filler rows without loss make up the difference. Images are decoded in full.

    Args:
        max_rows: rows over all ranks; None: all.
        other arguments: as of RowLoader.

    Raises:
        as RowLoader.
    """
    check_rows(config, micro_batch_size, multiple_of, fill_to)
    config = config.replace(jpeg_scaled_decoding=False)
    opened = open_data(config, processor, paths, seed=None, cache_dir=cache_dir, rank=dp_rank, num_ranks=dp_size)
    dataset, stream = opened.dataset, opened.stream
    survey(opened.counts, config, None)
    reader = RowReader(dataset, processor, config, seed=0, multiple_of=multiple_of, fill_to=fill_to)
    quarantine = Quarantine(config, output_dir)
    plans = _evaluation_plans(stream, 1 if config.packing else micro_batch_size, dp_rank, dp_size, max_rows)
    rows = RowWorkers(reader, plans, config.replace(num_workers=0) if len(dataset) < FEW else config)
    try:
        for item in rows:
            quarantine.add(item)
            assert item.row is not None
            yield item.row
    finally:
        rows.close()
        dataset.close()


def _evaluation_plans(
    stream: Stream, items_per_row: int, dp_rank: int, dp_size: int, max_rows: int | None
) -> Iterator[RowPlan]:
    row: list = []
    number = 0

    def plans() -> Iterator[RowPlan]:
        for place in stream.items():
            epoch = place[0]
            if epoch:
                break
            row.append(place)
            if len(row) == items_per_row:
                yield row_plan(row)
                row.clear()
        if row:
            yield row_plan(row)

    for plan in plans():
        if number == max_rows:
            break
        if number % dp_size == dp_rank:
            yield plan
        number += 1
    if number % dp_size and dp_rank >= number % dp_size:
        yield RowPlan(ids=(), tokens=(), epoch=0)


@dataclass(frozen=True, kw_only=True)
class OpenedData:
    """Data folders with what plans their rows."""

    dataset: Dataset
    counts: TokenCounts
    mixture: Mixture
    stream: Stream


def settings_of(paths: Sequence[SourceConfig | str | Path]) -> list[SourceConfig]:
    """Folders as settings, those that are named alone too."""
    return [path if isinstance(path, SourceConfig) else SourceConfig(path=str(path)) for path in paths]


def open_data(
    config: DataConfig,
    processor: Processor,
    paths: Sequence[SourceConfig | str | Path],
    *,
    seed: int | None,
    cache_dir: str | Path | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    costs: Costs = sample_costs,
) -> OpenedData:
    """Opens data folders, counts what is not counted yet and settles the order.

    Args:
        config, processor, paths, cache_dir: see RowLoader.
        seed: of the order; None: every sample once, as they lie in the shards.
        rank, num_ranks: see TokenCounts.
        costs: see Stream.

    Raises:
        DataError, ConfigError: as RowLoader.
    """
    settings = settings_of(paths)
    dataset = Dataset([setting.path for setting in settings])
    counts = TokenCounts(
        dataset,
        processor,
        cache_dir=cache_dir or config.cache_dir,
        num_workers=config.num_workers,
        max_patches=config.max_patches_per_row,
        rank=rank,
        num_ranks=num_ranks,
    )
    whole = MixtureSource(name="", first=0, samples=len(dataset), per_epoch=len(dataset))
    mixture = Mixture(
        [whole] if seed is None else resolve(dataset.folders, settings),
        seed=seed,
        window=config.packing_window,
        slice_size=config.slice_size,
        window_slices=config.window_slices,
    )
    return OpenedData(dataset=dataset, counts=counts, mixture=mixture, stream=Stream(counts, mixture, config, costs))


def check_batch(config: DataConfig, global_batch_size: int, micro_batch_size: int, dp_size: int) -> None:
    """Checks batch sizes against packing and the number of data parallel ranks.

    Raises:
        ConfigError: what does not divide, and what to set.
    """
    if min(global_batch_size, micro_batch_size) < 1:
        raise ConfigError(f"batch sizes must be at least 1, got global {global_batch_size}, micro {micro_batch_size}")
    if config.packing and micro_batch_size != 1:
        raise ConfigError(
            f"micro_batch_size is {micro_batch_size}, with data.packing it must be 1: raise data.seq_length to put "
            "more samples in a row"
        )
    if global_batch_size % (micro_batch_size * dp_size):
        raise ConfigError(
            f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} x "
            f"{dp_size} data parallel ranks"
        )


def check_rows(config: DataConfig, micro_batch_size: int, multiple_of: int, fill_to: int) -> None:
    """Checks that the longest possible row can be filled as asked.

    Raises:
        ConfigError: it cannot; the numbers and what to set.
    """
    longest = config.seq_length * (1 if config.packing else micro_batch_size)
    if config.packing and config.seq_length % multiple_of:
        raise ConfigError(
            f"data.seq_length {config.seq_length} is not a multiple of {multiple_of}, the ranks that split a row's tokens: set "
            f"it to {-(-config.seq_length // multiple_of) * multiple_of}"
        )
    if fill_to and (longest > fill_to or fill_to % multiple_of):
        raise ConfigError(
            f"rows are filled to {fill_to} tokens (a multiple of {multiple_of} is needed), but one can have {longest}: lower "
            "data.seq_length or training.micro_batch_size"
        )


def _packing_digest(config: DataConfig, global_batch_size: int) -> str:
    names = [
        "packing",
        "packing_window",
        "slice_size",
        "window_slices",
        "seq_length",
        "max_patches_per_row",
        "group_by",
    ]
    values = [f"{name}={getattr(config, name)}" for name in names]
    return digest_of(" ".join(values + [f"group={global_batch_size}"] * bool(config.group_by)))
