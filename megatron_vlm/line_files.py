"""Files of lines added as they come: a disk that refuses them is told of once, and they are written later."""

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from megatron_vlm.files import reason_of

LOGGER_NAME = "megatron_vlm"


class LineFile:
    """Lines added to a file, each by one write, so that several processes may add to it. It never ends a program.

    What the disk refuses waits in memory, up to ``_MOST_WAITING`` bytes, and is written once it is taken again.

    Args:
        path: the file; made when the first line comes.
    """

    _MOST_WAITING = 16 << 20

    def __init__(self, path: Path):
        self.path = path
        self._waiting = bytearray()
        self._descriptor: int | None = None
        self._refused = False
        self._dropped = 0

    def add(self, line: str) -> None:
        """Adds a line; tells of the first refusal, and of the end of it, in the log."""
        self._waiting += (line + "\n").encode(errors="backslashreplace")
        while len(self._waiting) > self._MOST_WAITING:
            del self._waiting[: self._waiting.index(b"\n") + 1]
            self._dropped += 1
        logger = logging.getLogger(LOGGER_NAME)
        try:
            self._write()
        except OSError as error:
            self.close()
            if not self._refused:
                self._refused = True
                logger.warning(
                    "%s cannot be written: %s. Its lines wait, and the run goes on", self.path, reason_of(error)
                )
            return
        if self._refused:
            self._refused = False
            lost = f", but {self._dropped} lines were lost" if self._dropped else ""
            self._dropped = 0
            logger.warning("%s is written again%s", self.path, lost)

    def close(self) -> None:
        """Closes the file; the next line opens it again."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def _write(self) -> None:
        if self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        while self._waiting:  # a disk that fills up takes a part, and the rest comes after it
            del self._waiting[: os.write(self._descriptor, self._waiting)]


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The mappings of a file, one a line; none without a file. A line that a killed process left incomplete is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found
