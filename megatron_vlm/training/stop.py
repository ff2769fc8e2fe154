"""Signals that ask a run to save and stop: SIGTERM, SIGUSR1 (Slurm's --signal) and Ctrl-C; the second stops at once."""

import os
import signal
import time
from types import FrameType
from typing import Any

from megatron_vlm.log import get_logger

STOPPED = 128 + signal.SIGTERM
"""Exit code of a run that saved and stopped by a signal."""


class StopSignal:
    """Remembers a signal until the next step boundary, where all ranks agree on it."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    AGAIN_SECONDS = 1.0
    """One Ctrl-C may come twice, of the terminal and of torchrun; what comes later is another."""

    def __init__(self) -> None:
        self.requested = False
        self._asked = 0.0
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {number: signal.signal(number, self._handle) for number in self.SIGNALS}

    def ignore(self) -> None:
        """Ignores further signals, as one rank of several that fails: torchrun signals all as soon as one is gone, and this
        one still has to say why."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._previous = {}
            for number in self.SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def close(self) -> None:
        """Puts the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked data worker: it has nothing to save
            os._exit(128 + number)
        if number == signal.SIGINT:
            if self.requested and time.monotonic() - self._asked > self.AGAIN_SECONDS:
                raise KeyboardInterrupt
            if not self.requested:
                get_logger(__name__).warning(
                    "stopping: the run finishes its step and saves; Ctrl-C once more stops at once"
                )
        self.requested = True
        self._asked = self._asked or time.monotonic()
