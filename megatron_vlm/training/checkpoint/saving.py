"""The saves of a run: in the step, tried again where they fail, or in the background (``checkpoint.async_save``).

save --in the step--> save_checkpoint --CheckpointError, on every rank--> wait --> save_checkpoint ... --> stop | continue
     --in the background--> BackgroundSaves.begin, then ``advance`` once a step
"""

import time
from collections.abc import Callable
from typing import Any

from megatron_vlm.errors import CheckpointError
from megatron_vlm.log import get_logger
from megatron_vlm.models.built import Model
from megatron_vlm.parallel.batch import together
from megatron_vlm.training.checkpoint.background import BackgroundSaves
from megatron_vlm.training.checkpoint.config import CheckpointConfig
from megatron_vlm.training.checkpoint.run_lock import RunLocks
from megatron_vlm.training.checkpoint.save import Origin, collect, save_checkpoint
from megatron_vlm.training.checkpoint.tries import Tries

log = get_logger(__name__)

_NOTABLE_SECONDS = 1.0
"""Back-pressure is told of from here on."""


class Saver:
    """Saves one run. All methods but ``close`` and ``times`` are collectives of the whole job.

    Args:
        config: where and how.
        model, optimizer: what.
        origin: of the run.
        locks: of its folders.
        hurry: a signal asks this rank to stop: it waits no more.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        model: Model,
        optimizer: Any,
        origin: Origin,
        locks: RunLocks,
        hurry: Callable[[], bool],
    ):
        self._config, self._model, self._optimizer, self._origin = config, model, optimizer, origin
        self._locks, self._hurry = locks, hurry
        self._background: BackgroundSaves | None = None
        if config.async_save:
            self._background = BackgroundSaves(config, origin, model.device, hurry, locks.check)
        self._held = self._waited = 0.0

    def save(self, state: dict[str, Any], last: bool) -> None:
        """Writes a checkpoint, or starts to.

        Args:
            state: see ``save_checkpoint``.
            last: of this run: all is written when this returns.

        Raises:
            CheckpointError: on every rank: it cannot be written, and ``checkpoint.on_save_failure`` is to stop.
        """
        began = time.monotonic()
        with together(self._model.device):
            self._locks.check()
        try:
            if self._background is None or not self._begin(self._background, state, last):
                self._save_now(state, last)
        finally:
            self._held += time.monotonic() - began

    def advance(self) -> None:
        """Takes a save in the background further; once a step.

        Raises:
            CheckpointError: as ``save``.
        """
        if self._background is not None:
            self._background.advance()

    def times(self) -> dict[str, float]:
        """Seconds that saves have held up training since the last call, and of these those spent waiting for the save before."""
        if self._background is None:
            return {}
        times = {"save_seconds": self._held, "save_wait_seconds": self._waited}
        self._held = self._waited = 0.0
        return times

    @property
    def in_flight(self) -> int | None:
        """Iteration that is being written in the background; None: none."""
        return self._background.iteration if self._background is not None else None

    def close(self) -> None:
        """Ends the saving process; safe after a failure."""
        if self._background is not None:
            self._background.close()

    def _begin(self, background: BackgroundSaves, state: dict[str, Any], last: bool) -> bool:
        """Starts a save once the one before it is done; False: this one is to be written in the step."""
        before, began = background.iteration, time.monotonic()
        background.wait()
        waited = time.monotonic() - began
        self._waited += waited
        if before is not None and not last and waited > _NOTABLE_SECONDS:
            log.warning(
                "iteration %d waited %.1f s to be saved: the save of iteration %d was still being written. Save less often "
                "(checkpoint.save_interval), or to a faster disk",
                state["iteration"],
                waited,
                before,
            )
        began = time.monotonic()
        content = collect(self._config, self._model, self._optimizer, state, self._origin)
        if not background.begin(content, last):
            log.warning(
                "iteration %d is written in the step: a host has no memory free for a copy of its part of %.2f GB "
                "(checkpoint.async_save)",
                content.iteration,
                content.num_bytes / 1e9,
            )
            return False
        seconds = time.monotonic() - began
        if last:
            background.wait()
        else:
            log.info(
                "iteration %d was copied in %.2f s and is written while training goes on", content.iteration, seconds
            )
        return True

    def _save_now(self, state: dict[str, Any], last: bool) -> None:
        tries = Tries(self._config)
        while True:
            try:
                save_checkpoint(self._config, self._model, self._optimizer, state, self._origin)
                return
            except CheckpointError as error:
                wait = tries.failed(error, last)
                if wait is None:
                    return
                _sleep(wait, self._hurry)


def _sleep(seconds: float, hurry: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not hurry():
        time.sleep(min(0.2, seconds))
