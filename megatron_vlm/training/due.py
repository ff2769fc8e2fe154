"""What is due after an iteration: the end, an evaluation, answers, a checkpoint. The same on every rank."""

from dataclasses import dataclass

from megatron_vlm.training.checkpoint.best import LOSS
from megatron_vlm.training.run_config import RunConfig


@dataclass(frozen=True)
class Due:
    """Where a run stands.

    Attributes:
        config: lengths and intervals.
        iteration: updates done.
        consumed: samples before the last of them, and now.
        samples_per_epoch: that an epoch trains on.
    """

    config: RunConfig
    iteration: int
    consumed: tuple[int, int]
    samples_per_epoch: int

    @property
    def finished(self) -> bool:
        """The run has its length."""
        training = self.config.training
        if training.train_iters is not None:
            return self.iteration >= training.train_iters
        wanted = training.train_samples or (training.train_epochs or 0) * self.samples_per_epoch
        return self.consumed[1] >= wanted

    @property
    def evaluation(self) -> bool:
        """``data.valid`` is evaluated now."""
        wanted = self.config.checkpoint.keep_best == LOSS and self.save
        return bool(self.config.data.valid) and (self.finished or self._evaluation_interval or wanted)

    @property
    def answers(self) -> bool:
        """``evaluate.prompts`` and ``evaluate.file`` are answered now."""
        every = self.config.evaluate.interval
        due = self.iteration % every == 0 if every else self._evaluation_interval
        wanted = self.config.checkpoint.keep_best not in (None, LOSS) and self.save
        return self.finished or due or wanted

    @property
    def save(self) -> bool:
        """A checkpoint is written now."""
        checkpoint = self.config.checkpoint
        if checkpoint.save is None:
            return False
        if checkpoint.save_interval is not None and self.iteration % checkpoint.save_interval == 0:
            return True
        return self.finished or self._passed(checkpoint.save_epochs)

    @property
    def _evaluation_interval(self) -> bool:
        every = self.config.training.eval_interval
        return bool(every and self.iteration % every == 0) or self._passed(self.config.training.eval_epochs)

    def _passed(self, epochs: float | None) -> bool:
        """The last step went past a multiple of ``epochs``."""
        every = self.samples_per_epoch * (epochs or 0.0)
        return bool(every) and self.consumed[0] // every < self.consumed[1] // every
