"""A checkpoint that is written while training goes on: every rank copies its part in the step, a process of its own writes it.

    begin: tensors --RankFile.copy_to--> memory of this host --SaveProcess--> rankR.safetensors
    advance, once a step, on every rank:
        writing     all ranks' files are there --agreed--> committing: rank 0's process writes the manifest, renames, tracker last
        committing  done --agreed--> nothing in flight
        a rank fails --told on all--> pausing --its time is up--> writing again, of the same copy | given up | raised

At most one is in flight. All decisions are taken by all ranks together, at the steps of the run; what the disk holds at any
moment is what a save in the step could leave there, so a kill loses no more. Every function but ``close`` is a collective.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from megatron_vlm.errors import CheckpointError
from megatron_vlm.log import get_logger
from megatron_vlm.parallel.batch import any_rank
from megatron_vlm.processes import available_memory
from megatron_vlm.training.checkpoint.config import CheckpointConfig
from megatron_vlm.training.checkpoint.save import Content, Origin, finishing, open_folder
from megatron_vlm.training.checkpoint.together import checkpoint_work, gather
from megatron_vlm.training.checkpoint.tries import Tries
from megatron_vlm.weights import checkpoint_write
from megatron_vlm.weights.save_process import HostImage, SaveProcess, write_image

log = get_logger(__name__)

_POLL_SECONDS = 0.02
_SLOW_SECONDS = 60.0
"""Between warnings of a save that does not end, while the run waits for it."""
_SPARE_BYTES = 1 << 30
"""Of host memory that a copy leaves to others."""


@dataclass
class _Flight:
    """The save that is under way.

    Attributes:
        content: what is saved; its tensors are in the copy.
        last: no save follows, so its failure is the run's.
        phase: what it waits for.
        folder: temporary, once there is one.
        until: end of a pause.
    """

    content: Content
    tries: Tries
    last: bool
    phase: Literal["writing", "committing", "pausing"] = "writing"
    folder: Path | None = None
    until: float = 0.0
    began: float = field(default_factory=time.monotonic)


class BackgroundSaves:
    """Saves of this run, one after the other.

    Args:
        config: where, and what follows a failure.
        origin: of the run.
        device: of this rank.
        hurry: a signal asks this rank to stop: it waits no more.
        check: raises CheckpointError where this run may write no more.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        origin: Origin,
        device: torch.device,
        hurry: Callable[[], bool],
        check: Callable[[], None],
    ):
        self._config, self._origin, self._device, self._hurry, self._check = config, origin, device, hurry, check
        self._flight: _Flight | None = None
        self._image = HostImage()
        self.process = SaveProcess(self._image)

    def begin(self, content: Content, last: bool = False) -> bool:
        """Copies ``content`` and starts to write it; nothing may be in flight. False: a host has no memory for the copy.

        Args:
            content: what.
            last: no save follows, so its failure is the run's.

        Raises:
            CheckpointError: on every rank: the first try failed at its start, and ``checkpoint.on_save_failure`` is to stop.
        """
        assert self._flight is None
        # Ranks of one host are asked one by one; each counts what the others will take, as if they held as much.
        need = (content.file.num_bytes - self._image.capacity) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if any_rank(need > available_memory() - _SPARE_BYTES, self._device):
            return False
        try:
            with checkpoint_work(content.what, self._device), torch.no_grad():
                content.file.copy_to(self._image)
        except CheckpointError as error:
            log.warning("no copy of iteration %d: %s", content.iteration, error)
            return False
        self._flight = _Flight(content, Tries(self._config), last)
        self._write(self._flight)
        return True

    def advance(self) -> None:
        """Looks once at what is in flight, and takes it further.

        Raises:
            CheckpointError: on every rank: given up, and the run is to stop.
        """
        flight = self._flight
        if flight is None:
            return
        if flight.phase == "pausing":
            ready = time.monotonic() >= flight.until or self._hurry()
        else:
            ready = self.process.done
        if any_rank(not ready, self._device):
            return
        if flight.phase == "pausing":
            self._write(flight)
        elif flight.phase == "writing":
            self._commit(flight)
        else:
            self._conclude(flight)

    def wait(self) -> None:
        """Waits until nothing is in flight; see ``advance``."""
        began = warned = time.monotonic()
        while self._flight is not None:
            self.advance()
            if time.monotonic() - warned > _SLOW_SECONDS:
                warned = time.monotonic()
                log.warning(
                    "waiting for a save in the background for %.0f s: storage that does not answer?", warned - began
                )
            time.sleep(_POLL_SECONDS if self._flight else 0)

    @property
    def iteration(self) -> int | None:
        """What is in flight; None: nothing."""
        return self._flight.content.iteration if self._flight else None

    def close(self) -> None:
        """Ends the saving process, with what is in flight; safe after a failure."""
        self.process.close()
        self._image.close()

    def _write(self, flight: _Flight) -> None:
        content = flight.content
        try:
            folder = flight.folder = open_folder(self._config, content, self._device)
            with checkpoint_work(content.what, self._device):
                image = self._image
                self.process.start(write_image, folder / content.file.name, image.descriptor, image.size)
            flight.phase = "writing"
        except CheckpointError as error:
            self._failed(flight, error)

    def _commit(self, flight: _Flight) -> None:
        content, record = flight.content, None
        assert flight.folder is not None
        try:
            with checkpoint_work(content.what, self._device):
                record = self.process.result()
            records = gather(record)
            with checkpoint_work(content.what, self._device):
                if content.rank == 0:
                    self._check()
                    arguments = finishing(self._config, content, records, self._origin, flight.folder)
                    self.process.start(checkpoint_write.finish, *arguments)
            flight.phase = "committing"
        except CheckpointError as error:
            self._failed(flight, error)

    def _conclude(self, flight: _Flight) -> None:
        content = flight.content
        try:
            with checkpoint_work(content.what, self._device):
                self.process.result()
        except CheckpointError as error:
            self._failed(flight, error)
            return
        self._flight = None
        place, seconds = content.place(self._config), time.monotonic() - flight.began
        log.info("saved %s (%.2f GB) in the background, %.1f s after its step", place, content.num_bytes / 1e9, seconds)
        self._origin.finished(content.iteration)

    def _failed(self, flight: _Flight, error: CheckpointError) -> None:
        self.process.abandon()  # another rank failed, this one may be at work
        if flight.folder is not None and flight.content.rank == 0:
            checkpoint_write.discard(flight.folder)
        flight.folder, self._flight = None, None
        wait = flight.tries.failed(error, flight.last)  # raises where the run is to stop
        if wait is not None:
            flight.phase, flight.until, self._flight = "pausing", time.monotonic() + wait, flight
