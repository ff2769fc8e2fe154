"""A save that failed is tried again; what follows in the end is decided alike on every rank.

write --CheckpointError, on every rank--> wait --> write ... --> stop | continue
"""

import time
from collections.abc import Callable

from megatron_vlm.errors import CheckpointError
from megatron_vlm.log import get_logger
from megatron_vlm.training.checkpoint.config import CheckpointConfig

log = get_logger(__name__)


def save_persistently(
    config: CheckpointConfig, write: Callable[[], object], hurry: Callable[[], bool], last: bool
) -> bool:
    """Calls ``write`` until it succeeds; returns whether it did. A collective of the whole job, as ``write`` is.

    Args:
        config: ``save_retries``, ``save_retry_seconds`` and ``on_save_failure``.
        write: raises CheckpointError on every rank, or on none.
        hurry: a signal asks this rank to stop: it waits no more.
        last: there is no later save, so its failure is the run's.

    Raises:
        CheckpointError: on every rank: given up, and the run is to stop.
    """
    wait = config.save_retry_seconds
    for left in range(config.save_retries, -1, -1):
        try:
            write()
            return True
        except CheckpointError as error:
            if left:
                log.warning("a save failed, %d more tries, the next in %g s: %s", left, wait, error)
                _sleep(wait, hurry)
                wait *= 2
            elif last or config.on_save_failure == "stop":
                raise
            else:
                log.error(
                    "a save failed and is given up; the run goes on (checkpoint.on_save_failure continue): %s", error
                )
    return False


def _sleep(seconds: float, hurry: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not hurry():
        time.sleep(min(0.2, seconds))
