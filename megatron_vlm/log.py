"""Logging that knows its rank: the first of each node speaks at INFO, the others at WARNING, all but rank 0 with it in front.

What megatron-core and bitsandbytes warn of at every start goes to train.log alone, each text once.
"""

import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from megatron_vlm.line_files import LOGGER_NAME, LineFile


def get_logger(name: str = LOGGER_NAME) -> logging.Logger:
    """Returns the package's logger, or a child of it for a module's ``__name__``."""
    return logging.getLogger(name if name.startswith(LOGGER_NAME) else f"{LOGGER_NAME}.{name}")


def quiet_libraries() -> None:
    """Keeps what libraries say at every start off the screen, and that alone; before they are imported, in every process."""
    global _show_others
    if warnings.showwarning is not _show_warning:
        _show_others, warnings.showwarning = warnings.showwarning, _show_warning
    for name in ("bitsandbytes", "megatron"):
        library = logging.getLogger(name)
        library.propagate, library.handlers = False, [_libraries]
    # megatron-core 0.16.1 calls collectives by names that torch is about to retire.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def setup_logging(rank: int | None = None, file: str | os.PathLike | None = None, level: int = logging.INFO) -> None:
    """Sends the package's log lines to stdout and, on rank 0, to ``file`` as well. Safe to call again."""
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    logger = logging.getLogger(LOGGER_NAME)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        if isinstance(handler, _FileHandler):
            handler.close()
    logger.propagate = False
    first = rank == 0 or os.environ.get("LOCAL_RANK") == "0"  # another node's log would say nothing of the run
    logger.setLevel(level if first else max(level, logging.WARNING))
    prefix = "" if rank == 0 else f"[rank {rank}] "
    formatter = logging.Formatter(f"%(asctime)s %(levelname)s {prefix}%(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if file is not None and rank == 0:
        handlers.append(_FileHandler(Path(file)))
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    _libraries.write_to(handlers[1] if len(handlers) > 1 else None)


class _LibraryWarnings(logging.Handler):
    """Warnings of libraries, each text once: in the log's file, held until there is one."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: set[str] = set()
        self._held: list[logging.LogRecord] = []
        self._file: logging.Handler | None = None

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text in self._said:
            return
        self._said.add(text)
        self._held.append(record)
        self.write_to(self._file)

    def write_to(self, file: logging.Handler | None) -> None:
        """Writes what is held, and from now on what comes."""
        self._file = file
        while file is not None and self._held:
            file.emit(self._held.pop(0))


_libraries = _LibraryWarnings()
_show_others = warnings.showwarning
_OF_LIBRARIES = re.compile(r"[/\\](megatron[/\\]core|bitsandbytes|transformer_engine|apex)[/\\]")


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    if library := _OF_LIBRARIES.search(filename):
        text = f"{category.__name__} of {library[1]}: {message}"
        _libraries.emit(logging.makeLogRecord({"levelno": logging.WARNING, "levelname": "WARNING", "msg": text}))
    else:
        _show_others(message, category, filename, lineno, file, line)


class _FileHandler(logging.Handler):
    """Lines in a file; one that cannot be written is told of once, and does not end the program."""

    def __init__(self, path: Path):
        super().__init__()
        self._file = LineFile(path)

    def emit(self, record: logging.LogRecord) -> None:
        self._file.add(self.format(record))

    def close(self) -> None:
        self._file.close()
        super().close()
