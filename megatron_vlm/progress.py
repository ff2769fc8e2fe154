"""A bar with rates and the time left on a terminal; nothing elsewhere, where log lines tell the same.

Bar.show(done, note) --terminal--> title ━━━━━━╺━━━ 120/700  note  0:00:12 < 0:01:40
                     --pipe, file, Slurm--> nothing
WarmUp               --a first step of over 5 s--> a line that says why
"""

import logging
import sys
import threading
from types import TracebackType
from typing import Any, Self, TextIO

from megatron_vlm.log import LOGGER_NAME, get_logger

_SLOW_SECONDS = 5.0


class Bar:
    """One bar, from construction to ``close``. Log lines of the package appear above it meanwhile.

    Args:
        title: in front.
        total: what is to be done; None: not known.
        done: what is done already; the time left is reckoned without it.
        file: where; None: stdout.
    """

    def __init__(self, title: str, total: int | None, *, done: int = 0, file: TextIO | None = None):
        self._progress: Any = None
        self._handlers: list[tuple[logging.StreamHandler, Any]] = []
        file = sys.stdout if file is None else file
        if not file.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Left

        note = TextColumn("{task.fields[note]}", markup=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), note)
        times = (TimeElapsedColumn(), TextColumn("<"), Left())
        # The last minute decides about the time left: a first step that compiles or loads must not.
        self._progress = Progress(*columns, *times, console=Console(file=file), speed_estimate_period=60)
        self._task = self._progress.add_task(title, total=total, completed=done, note="")
        self._progress.start()
        for handler in logging.getLogger(LOGGER_NAME).handlers:
            if type(handler) is logging.StreamHandler:
                self._handlers.append((handler, handler.setStream(sys.stdout)))  # rich's, which prints above the bar

    @property
    def visible(self) -> bool:
        """Whether there is a terminal to show it on."""
        return self._progress is not None

    def show(self, done: int, note: str = "", total: int | None = None) -> None:
        """Moves the bar to ``done`` (of a new ``total``, where it is known by now)."""
        if self._progress is not None:
            changes = {} if total is None else {"total": total}
            self._progress.update(self._task, completed=done, note=note, **changes)

    def close(self) -> None:
        """Leaves the bar as it is on the screen; safe to call again."""
        if self._progress is None:
            return
        self._progress.stop()
        self._progress = None
        for handler, stream in self._handlers:
            handler.setStream(stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class WarmUp:
    """A block that says what it is busy with, where it takes over 5 s; the first time alone."""

    def __init__(self) -> None:
        text = "the first step warms up: kernels are picked or compiled and memory is claimed; the next ones are faster"
        self._timer: threading.Timer | None = threading.Timer(_SLOW_SECONDS, get_logger().info, (text,))
        self._timer.daemon = True

    def __enter__(self) -> None:
        if self._timer is not None:
            self._timer.start()

    def __exit__(self, *error: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
