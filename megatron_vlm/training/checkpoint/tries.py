"""What follows a save that failed: another try, the next save, or the end of the run. Decided alike on every rank."""

from megatron_vlm.errors import CheckpointError
from megatron_vlm.log import get_logger
from megatron_vlm.training.checkpoint.config import CheckpointConfig

log = get_logger(__name__)


class Tries:
    """Of one save.

    Args:
        config: ``save_retries``, ``save_retry_seconds`` and ``on_save_failure``.
    """

    def __init__(self, config: CheckpointConfig):
        self._config = config
        self._left, self._wait = config.save_retries, config.save_retry_seconds

    def failed(self, error: CheckpointError, last: bool) -> float | None:
        """Seconds to wait before the next try; None: given up, and the run goes on.

        Args:
            error: of the last try, the same on every rank.
            last: there is no later save, so its failure is the run's.

        Raises:
            CheckpointError: given up, and the run is to stop.
        """
        if self._left:
            wait = self._wait
            log.warning("a save failed, %d more tries, the next in %g s: %s", self._left, wait, error)
            self._left, self._wait = self._left - 1, 2 * wait
            return wait
        if last or self._config.on_save_failure == "stop":
            raise error
        log.error("a save failed and is given up; the run goes on (checkpoint.on_save_failure continue): %s", error)
        return None
