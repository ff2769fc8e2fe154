"""The best checkpoint of a run, which stays however many come after it (``checkpoint.keep_best``).

score of an iteration --saving--> best.json beside the checkpoints --folder--> what is not removed
"""

import contextlib
from pathlib import Path

from megatron_vlm.errors import CheckpointError
from megatron_vlm.files import read_json, write_json
from megatron_vlm.log import get_logger
from megatron_vlm.scoring.metrics import LOWER_IS_BETTER
from megatron_vlm.weights.checkpoint_dir import folder_name

log = get_logger(__name__)

FILE, LOSS = "best.json", "loss"


class Best:
    """Scores of saved iterations; on every rank, written by rank 0.

    Args:
        root: ``checkpoint.save``.
        metric: ``loss`` (of held-out data), or one of ``evaluate.metrics``.
        iteration: that the run goes on from; scores of later ones, which an abandoned run wrote, are forgotten.
        writes: this rank writes the file.
    """

    def __init__(self, root: Path, metric: str, iteration: int, writes: bool):
        self._root, self._metric, self._writes = root, metric, writes
        self._scores: dict[int, float] = {}
        if (root / FILE).is_file():
            before = read_json(root / FILE, CheckpointError)
            if before.get("metric") == metric:
                self._scores = {int(i): value for i, value in before["scores"].items() if int(i) <= iteration}

    @property
    def folder(self) -> Path | None:
        """The best of those that are there; of equal ones the earliest."""
        there = [i for i in sorted(self._scores) if (self._root / folder_name(i)).is_dir()]
        return self._root / folder_name(self._choose(there)) if there else None

    def saving(self, iteration: int, score: float) -> None:
        """Takes the score of an iteration that is saved now; a score that is no number is never the best."""
        if score != score:
            return
        self._scores[iteration] = score
        best = self._choose(sorted(self._scores))
        if best == iteration:
            log.info("iteration %d has the best %s so far: %.6f", iteration, self._metric, score)
        if self._writes:
            with contextlib.suppress(OSError):  # it stays protected all the same
                write_json(self._root / FILE, {"metric": self._metric, "best": best, "scores": self._scores})

    def _choose(self, iterations: list[int]) -> int:
        lower = self._metric in (*LOWER_IS_BETTER, LOSS)
        return min(iterations, key=lambda i: self._scores[i] if lower else -self._scores[i])
