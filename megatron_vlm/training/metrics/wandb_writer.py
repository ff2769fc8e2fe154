"""Weights & Biases as a writer with TensorBoard's calls. The package is optional; its own environment variables hold:
WANDB_MODE=offline keeps everything in output_dir/wandb, which ``wandb sync`` uploads later; WANDB_PROJECT, WANDB_ENTITY.
"""

import importlib.util
import os
import uuid
from pathlib import Path
from typing import Any

from megatron_vlm.errors import ConfigError

_ID = "wandb_run_id.txt"


def check_wandb() -> None:
    """Raises ConfigError unless the package is installed."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "logging.wandb (report_to wandb) needs the package wandb, which is not installed: `pip install wandb`, or report to "
            "tensorboard or none"
        )


class WandbWriter:
    """One run; a resumed one goes on in the same run, whose id lies beside the metrics.

    Args:
        output_dir: directory of the run.
        name: shown for it.
        config: the resolved config.
        resumed: go on with the run that this directory belongs to.
    """

    def __init__(self, output_dir: Path, name: str, config: dict[str, Any], *, resumed: bool):
        check_wandb()
        import wandb

        path = output_dir / _ID
        run_id = path.read_text(encoding="utf-8").strip() if resumed and path.is_file() else uuid.uuid4().hex[:12]
        path.write_text(run_id + "\n", encoding="utf-8")
        project = os.environ.get("WANDB_PROJECT", "megatron_vlm")
        self.run = wandb.init(
            project=project, name=name, id=run_id, resume="allow", dir=str(output_dir), config=config, reinit=True
        )

    def add_scalar(self, name: str, value: float | None, step: int) -> None:
        """Records a number; ``step`` is the iteration."""
        if value is not None:
            self.run.log({name: value}, step=step)

    def add_text(self, name: str, text: str, step: int) -> None:
        """Records a text."""
        self.run.log({name: text}, step=step)

    def close(self) -> None:
        """Ends the run; what is still to be sent is sent."""
        self.run.finish()
