"""The section ``logging`` of a run."""

from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.training.metrics.trackers import TRACKERS, check_tracker


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Config):
    """Where a run reports.

    Attributes:
        name: name of the run, for the default output directory.
        output_dir: where config.yaml, metrics.jsonl, train.log and TensorBoard events go; None: ``checkpoint.save``,
            else ``./runs/<name>``.
        log_interval: steps between two progress lines and TensorBoard points; metrics.jsonl has every step.
        tensorboard: write TensorBoard events.
        tensorboard_dir: where; None: ``tensorboard`` in the output directory.
        wandb: report to Weights & Biases, too (package wandb; WANDB_MODE=offline and its other variables hold).
        mlflow: report to MLflow, too (package mlflow): to MLFLOW_TRACKING_URI, else to ``mlflow.db`` in the output directory.
        swanlab: report to SwanLab, too (package swanlab; SWANLAB_MODE=offline and its other variables hold).
    """

    name: str = "train"
    output_dir: Path | None = None
    log_interval: int = 10
    tensorboard: bool = True
    tensorboard_dir: Path | None = None
    wandb: bool = False
    mlflow: bool = False
    swanlab: bool = False

    def __post_init__(self) -> None:
        if self.log_interval < 1:
            raise ConfigError(f"logging.log_interval must be at least 1, got {self.log_interval}")
        if self.tensorboard_dir is not None and not self.tensorboard:
            raise ConfigError("logging.tensorboard_dir has no effect while logging.tensorboard is false")
        for name in self.trackers:
            check_tracker(name)

    @property
    def trackers(self) -> list[str]:
        """Services that the run reports to, by their packages."""
        return [name for name in TRACKERS if getattr(self, name)]
