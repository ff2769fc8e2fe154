"""Signals that ask a run to save and stop: SIGTERM, and SIGUSR1 (Slurm's --signal)."""

import os
import signal
from types import FrameType
from typing import Any

STOPPED = 128 + signal.SIGTERM
"""Exit code of a run that saved and stopped by a signal."""


class StopSignal:
    """Remembers a signal until the next step boundary, where all ranks agree on it."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested = False
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
        self.requested = True
