"""TensorBoard and trackers: writers of others' making, which never end a run.

add_scalar, add_text --> the writer --fails--> told once; a new one is made a minute later, and again
"""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from megatron_vlm.log import get_logger

log = get_logger(__name__)

_AGAIN_SECONDS = 60.0


class SafeWriter:
    """A writer that may fail.

    Args:
        name: for messages.
        make: makes one; called at once, and again some time after a failure.

    Raises:
        Exception: what ``make`` raises the first time.
    """

    def __init__(self, name: str, make: Callable[[], Any]):
        self._name, self._make = name, make
        self._writer: Any = make()
        self._again, self._missed = 0.0, 0
        threading.excepthook = _without_tensorboard

    def add_scalar(self, name: str, value: float | None, step: int) -> None:
        """Records a number; ``step`` is the iteration."""
        self._do(lambda writer: writer.add_scalar(name, value, step))

    def add_text(self, name: str, text: str, step: int) -> None:
        """Records a text."""
        self._do(lambda writer: writer.add_text(name, text, step))

    def flush(self) -> None:
        """Sends what is held back, where the writer holds anything back."""
        self._do(lambda writer: getattr(writer, "flush", lambda: None)())

    def close(self) -> None:
        """Ends it."""
        self._do(lambda writer: writer.close())
        self._writer, self._again = None, float("inf")

    def _do(self, what: Callable[[Any], None]) -> None:
        try:
            if self._writer is None:
                self._missed += 1
                if time.monotonic() < self._again:
                    return
                self._again = time.monotonic() + _AGAIN_SECONDS
                self._writer = self._make()
                log.warning("%s is written again; %d points are missing", self._name, self._missed - 1)
                self._missed = 0
            what(self._writer)
        except Exception as error:  # whatever it is: the run is worth more
            if self._writer is not None:
                log.warning(
                    "%s fails, and is tried again from time to time: %s: %s", self._name, type(error).__name__, error
                )
                with contextlib.suppress(Exception):
                    self._writer.close()
                self._writer, self._again = None, time.monotonic() + _AGAIN_SECONDS


_default_hook = threading.excepthook


def _without_tensorboard(args: Any) -> None:
    """An error of TensorBoard's thread is raised once more at the next call, where it is told of without a traceback."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        _default_hook(args)
