"""Steps on their way into the metrics: on a GPU each is read while the next one is at work.

start_step --add--> unread --the next add, or flush before anything that must know--> metrics, or the log
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vlm.errors import TrainingError
from megatron_vlm.log import get_logger
from megatron_vlm.training.metrics.facts import Facts
from megatron_vlm.training.metrics.logger import Metrics, progress_line
from megatron_vlm.training.step import RunningStep

log = get_logger(__name__)


@dataclass(frozen=True)
class Unread:
    """A step whose result is not read yet, and what is reported with it."""

    step: RunningStep
    iteration: int
    rates: dict[str, float]
    consumed_samples: int
    sample_ids: Sequence[int]


class StepReports:
    """Of one run, on every rank.

    Args:
        facts: of the run.
        metrics: on rank 0.
        total: iterations of the run.
        interval: iterations between lines in the log of other ranks.
        times: what a line says of saves.
        late: a step is read when the next one has been started: to ask for it at once leaves a GPU idle until it is told more.
    """

    def __init__(
        self,
        facts: Facts,
        metrics: Metrics | None,
        total: int,
        interval: int,
        times: Callable[[], dict[str, Any]],
        *,
        late: bool,
    ):
        self.facts, self.metrics, self.total, self.interval, self.times = facts, metrics, total, interval, times
        self.late = late
        self._unread: Unread | None = None
        self._clock = 0.0

    def begin(self) -> None:
        """A step begins: its seconds count from here, or from where the one before was read."""
        if self._unread is None:
            self._clock = time.monotonic()

    def add(self, started: Unread) -> None:
        """Takes a step that was started; reads the one before it, and without ``late`` this one."""
        self.flush()
        self._unread = started
        if not self.late:
            self.flush()

    def give_up(self) -> None:
        """The run ends by an error: reports the step before it if its result is there, and waits for nothing."""
        if self._unread is not None and self._unread.step.arrived:
            try:
                self.flush()
            except TrainingError as error:
                log.error("%s", error)

    def flush(self) -> None:
        """Waits for the step that was not read yet, if there is one, and reports it.

        Raises:
            TrainingError: on every rank: its loss or norm is not finite.
        """
        if self._unread is None:
            return
        last, self._unread = self._unread, None
        result, now = last.step.result(), time.monotonic()
        seconds, self._clock = now - self._clock, now
        if self.metrics is not None:
            more = {**self.times(), **self.facts.of_step(result, seconds, last.sample_ids)}
            done = last.consumed_samples
            self.metrics.step(last.iteration, result, last.rates, seconds=seconds, consumed_samples=done, **more)
        elif last.iteration % self.interval == 0 or last.iteration in (1, self.total):
            log.info(progress_line(last.iteration, self.total, result, last.rates["llm"], seconds))
