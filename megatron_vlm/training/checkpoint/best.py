"""The best checkpoint of a run, which stays however many come after it (``checkpoint.keep_best``). On rank 0 alone.

score of an iteration --saving--> scores --record--> checkpoint_write.finish: best.json, what is not removed --> saved
"""

import contextlib
from pathlib import Path
from typing import Any

from megatron_vlm.errors import CheckpointError
from megatron_vlm.files import read_json, write_json
from megatron_vlm.log import get_logger
from megatron_vlm.scoring.metrics import LOWER_IS_BETTER
from megatron_vlm.weights import remote
from megatron_vlm.weights.checkpoint_dir import BEST, folder_name

log = get_logger(__name__)

LOSS = "loss"


class Best:
    """Scores of saved iterations.

    Args:
        root: folder of the checkpoints; with ``url`` the one that they are written to first.
        metric: ``loss`` (of held-out data), or one of ``evaluate.metrics``.
        iteration: that the run goes on from; scores of later ones, which an abandoned run wrote, are forgotten.
        url: store that they go to, where they count.

    Raises:
        CheckpointError: best.json is damaged, or the store does not answer.
    """

    def __init__(self, root: Path, metric: str, iteration: int, url: str | None = None):
        self._root, self._metric = root, metric
        self._scores: dict[int, float] = {}
        self._stored = set(remote.iterations(url)) if url is not None else None
        if url is not None:
            remote.fetch_file(url, BEST, root / BEST)
        if (root / BEST).is_file():
            before = read_json(root / BEST, CheckpointError)
            if before.get("metric") == metric:
                self._scores = {int(i): value for i, value in before["scores"].items() if int(i) <= iteration}

    def record(self, iteration: int | None = None) -> dict[str, Any]:
        """What best.json holds: ``best`` is the best of those that are there, of equal ones the earliest.

        Args:
            iteration: whose save is finished now.
        """
        there = [i for i in sorted(self._scores) if i == iteration or self._is_there(i)]
        lower = self._metric in (*LOWER_IS_BETTER, LOSS)
        best = min(there, key=lambda i: self._scores[i] if lower else -self._scores[i], default=None)
        return {"metric": self._metric, "best": best, "scores": self._scores}

    def saving(self, iteration: int, score: float) -> None:
        """Takes the score of an iteration whose save begins; a score that is no number is never the best."""
        if score == score:
            self._scores[iteration] = score
            with contextlib.suppress(OSError):  # the save will say more
                write_json(self._root / BEST, self.record())

    def saved(self, iteration: int) -> None:
        """Told of a save that is finished."""
        if self._stored is not None:
            self._stored.add(iteration)
        if self.record()["best"] == iteration:
            log.info("iteration %d has the best %s so far: %.6f", iteration, self._metric, self._scores[iteration])

    def _is_there(self, iteration: int) -> bool:
        if self._stored is not None:
            return iteration in self._stored
        return (self._root / folder_name(iteration)).is_dir()
