"""What a run's folder says of it, read back: its steps, evaluations, answers, starts and what it left out. No torch.

metrics.jsonl, samples.jsonl, starts.jsonl, excluded.jsonl, quarantine.jsonl, config.yaml --> RunFiles;  smoothed(losses)
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.files import read_text
from megatron_vlm.line_files import json_lines

Points = list[tuple[float, float]]
"""(iteration, value), in order."""


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """A run's folder as it now is.

    Attributes:
        folder: of the run.
        steps: lines of metrics.jsonl about optimizer steps.
        evaluations: its other lines.
        answers: lines of samples.jsonl.
        starts: lines of starts.jsonl, the first one first.
    """

    folder: Path
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    starts: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "RunFiles":
        """Reads what is there by now.

        Raises:
            ConfigError: it is no run's folder.
        """
        if not (folder / "metrics.jsonl").is_file():
            raise ConfigError(
                f"{folder} holds no metrics.jsonl: name the folder of a run (logging.output_dir, --output_dir)"
            )
        lines = [line for line in json_lines(folder / "metrics.jsonl") if isinstance(line.get("iteration"), int)]
        return cls(
            folder=folder,
            steps=[line for line in lines if "step_seconds" in line],
            evaluations=[line for line in lines if "step_seconds" not in line],
            answers=[line for line in json_lines(folder / "samples.jsonl") if "prompt" in line],
            starts=json_lines(folder / "starts.jsonl"),
        )

    def series(self, key: str) -> Points:
        """A number of each step, or of each evaluation, where it is there and finite."""
        return [
            (line["iteration"], float(line[key]))
            for line in (*self.steps, *self.evaluations)
            if isinstance(line.get(key), int | float)
        ]

    @property
    def scores(self) -> list[str]:
        """Names of what evaluations measure beside the loss."""
        keys = dict.fromkeys(key for line in self.evaluations for key in line)
        return [key for key in keys if key not in ("iteration", "eval_loss") and self.series(key)]

    @cached_property
    def data(self) -> dict[str, Any]:
        """What the loader found at the last start: samples, excluded by reason, mixture."""
        return next((start["data"] for start in reversed(self.starts) if start.get("data")), {})

    @cached_property
    def left_out(self) -> Counter[str]:
        """Samples that were not trained on, by reason: excluded before the start, or holes while it ran."""
        found = Counter({str(name).replace("_", " "): int(n) for name, n in (self.data.get("excluded") or {}).items()})
        found.update(f"{line.get('reason', 'unreadable')} (while training)" for line in self._quarantined)
        return found

    @property
    def _quarantined(self) -> list[dict[str, Any]]:
        return json_lines(self.folder / "quarantine.jsonl")

    @cached_property
    def shares(self) -> list[tuple[str, float, float, int]]:
        """(source, share of samples asked for, share as trained, samples as trained), where there is more than one."""
        mixture = self.data.get("mixture") or {}
        counts = [line["sources"] for line in self.steps if len(line.get("sources") or ()) == len(mixture)]
        if len(mixture) < 2 or not counts:
            return []
        sums = [sum(column) for column in zip(*counts)]
        return [
            (name, float(source["sample_share"]), number / max(1, sum(sums)), number)
            for (name, source), number in zip(mixture.items(), sums)
        ]

    @property
    def config(self) -> str:
        """config.yaml as text."""
        path = self.folder / "config.yaml"
        return read_text(path) if path.is_file() else ""


def smoothed(values: Sequence[float]) -> list[float]:
    """Running mean of what came before, later values more: m_t = m_(t-1) + (x_t - m_(t-1)) / w_t.

    w_t grows from 1 by an eighth a value, so that a steep start is followed, to a fortieth of the run, at most 100.
    """
    most, mean, result = max(2.0, min(100.0, len(values) / 40)), 0.0, list[float]()
    for number, value in enumerate(values):
        mean += (value - mean) / min(most, 1 + number / 8)
        result.append(mean)
    return result
