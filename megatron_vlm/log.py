"""Logging that knows its rank: the first of each node speaks at INFO, the others at WARNING, all but rank 0 with it in front."""

import logging
import os
import sys
import warnings
from pathlib import Path

from megatron_vlm.line_files import LOGGER_NAME, LineFile


def get_logger(name: str = LOGGER_NAME) -> logging.Logger:
    """Returns the package's logger, or a child of it for a module's ``__name__``."""
    return logging.getLogger(name if name.startswith(LOGGER_NAME) else f"{LOGGER_NAME}.{name}")


def quiet_libraries() -> None:
    """Keeps back what megatron-core and torch say at every start, and that alone; before they are imported, in every process."""
    # What is not installed is optional; `launch` and the docs say what it is good for.
    warnings.filterwarnings("ignore", r".*\b(Transformer Engine|Apex|apex)\b.*\bnot installed", UserWarning)
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
