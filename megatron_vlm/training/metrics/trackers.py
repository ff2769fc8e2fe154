"""Weights & Biases, MLflow and SwanLab as writers with TensorBoard's calls: add_scalar, add_text, close.

Each package is optional, and its own environment variables hold. Without a server everything stays in the run's folder:

    wandb    WANDB_MODE=offline    output_dir/wandb, `wandb sync` uploads it later; WANDB_PROJECT, WANDB_ENTITY
    swanlab  SWANLAB_MODE=offline  output_dir/swanlog, `swanlab sync` uploads it later; SWANLAB_PROJECT, SWANLAB_WORKSPACE
    mlflow   by default            output_dir/mlflow.db; MLFLOW_TRACKING_URI names a server, MLFLOW_EXPERIMENT_NAME
"""

import importlib
import importlib.util
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_vlm.errors import ConfigError

PROJECT = "megatron_vlm"
_MOST_OF_A_PARAMETER = 500  # characters that MLflow takes


class Tracker:
    """One run; a resumed one goes on in the same run, whose id lies beside the metrics.

    Args:
        output_dir: directory of the run.
        name: shown for it.
        config: the resolved config.
        resumed: go on with the run that this directory belongs to.
    """

    package = title = ""

    def __init__(self, output_dir: Path, name: str, config: dict[str, Any], *, resumed: bool):
        check_tracker(self.package)
        self._module = importlib.import_module(self.package)
        path = output_dir / f"{self.package}_run_id.txt"
        known = path.read_text(encoding="utf-8").strip() if resumed and path.is_file() else None
        run_id = self._start(output_dir, name, config, known)
        path.write_text(run_id + "\n", encoding="utf-8")

    def _start(self, output_dir: Path, name: str, config: dict[str, Any], known: str | None) -> str:
        """Starts the run, or goes on with the ``known`` one; returns its id."""
        raise NotImplementedError

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

    run: Any


class Wandb(Tracker):
    """A run of Weights & Biases."""

    package, title = "wandb", "Weights & Biases"

    def _start(self, output_dir: Path, name: str, config: dict[str, Any], known: str | None) -> str:
        run_id, project = known or uuid.uuid4().hex[:12], os.environ.get("WANDB_PROJECT", PROJECT)
        self.run = self._module.init(
            project=project, name=name, id=run_id, resume="allow", dir=str(output_dir), config=config, reinit=True
        )
        return run_id


class SwanLab(Tracker):
    """A run of SwanLab."""

    package, title = "swanlab", "SwanLab"

    def _start(self, output_dir: Path, name: str, config: dict[str, Any], known: str | None) -> str:
        run_id, project = known or uuid.uuid4().hex[:21], os.environ.get("SWANLAB_PROJECT", PROJECT)
        self.run = self._module.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow",
            log_dir=str(output_dir / "swanlog"),
            config=config,
            reinit=True,
        )
        return run_id

    def add_text(self, name: str, text: str, step: int) -> None:
        self.run.log({name: self._module.Text(text)}, step=step)


class MLflow(Tracker):
    """A run of an MLflow experiment, by its client: no run of this process is the active one."""

    package, title = "mlflow", "MLflow"

    def _start(self, output_dir: Path, name: str, config: dict[str, Any], known: str | None) -> str:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        where = {} if uri else {"artifact_location": (output_dir.absolute() / "mlflow_files").as_uri()}
        self.client = self._module.MlflowClient(tracking_uri=uri or f"sqlite:///{output_dir.absolute() / 'mlflow.db'}")
        if known is not None:
            self.client.update_run(known, status="RUNNING")
            self.run_id = known
            return known
        wanted = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(wanted)
        experiment = found.experiment_id if found else self.client.create_experiment(wanted, **where)
        self.run_id = self.client.create_run(experiment, run_name=name).info.run_id
        for key, value in _flat(config):
            self.client.log_param(self.run_id, key, str(value)[:_MOST_OF_A_PARAMETER])
        return self.run_id

    def add_scalar(self, name: str, value: float | None, step: int) -> None:
        if value is not None:
            self.client.log_metric(self.run_id, name, value, step=step)

    def add_text(self, name: str, text: str, step: int) -> None:
        self.client.log_text(self.run_id, text, f"{name}/{step:07d}.txt")

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


TRACKERS: dict[str, type[Tracker]] = {tracker.package: tracker for tracker in (Wandb, MLflow, SwanLab)}
"""Setting of section ``logging``, word of --report_to and package -> its class."""


def check_tracker(name: str) -> None:
    """Raises ConfigError unless the package is installed."""
    if importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"logging.{name} (report_to {name}) needs the package {name}, which is not installed: `pip install {name}`, or "
            "report to tensorboard or none"
        )


def _flat(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """``section.key`` -> value."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
