"""What is known of a start and of a step beside losses and rates: parameters, model FLOPs, sources, versions.

Facts --of_start--> a line of starts.jsonl    --of_step--> tflops, mfu, sources of a line of metrics.jsonl
"""

import platform
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_vlm import __version__
from megatron_vlm.data.stream.loader import RowLoader
from megatron_vlm.models.built import Model
from megatron_vlm.training.memory.flops import Flops
from megatron_vlm.training.run_config import RunConfig
from megatron_vlm.training.step import StepResult
from megatron_vlm.weights.mapping import GROUPS, group_of

PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "H800": 989.4, "A100": 312.0, "A800": 312.0, "B200": 2250.0, "L40S": 362.0}
"""Dense bf16 and fp16 operations a second of a GPU whose name holds the key, in 1e12, as its maker's data sheet says."""
_PACKAGES = ("torch", "megatron-core", "transformers", "peft", "safetensors")


class Facts:
    """Of one run, on every rank. Making it is a collective of the whole job.

    Args:
        config: of the run.
        model: built.
        loader: of the training rows, where this rank has one.
        adapts: only adapters train, and what trains in full beside them.

    Attributes:
        trained: group -> parameters that train, over the ranks of one copy of the model.
    """

    def __init__(self, config: RunConfig, model: Model, loader: RowLoader | None, *, adapts: bool):
        self._config, self._model, self._loader, self._adapts = config, model, loader, adapts
        counts, copy = dict.fromkeys(GROUPS, 0), model.topology.cp_rank or model.topology.dp_rank
        for name, parameter in model.named_parameters():
            counts[group_of(name)] += parameter.numel() if parameter.requires_grad and not copy else 0
        values = torch.tensor(list(counts.values()), device=model.device)
        dist.all_reduce(values)
        self.trained = dict(zip(counts, values.tolist()))
        self._gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
        known = [peak for name, peak in PEAK_TFLOPS.items() if name in self._gpu]
        self._peak = known[0] if known and config.training.precision != "fp32" else None

    def __str__(self) -> str:
        topology = self._model.topology
        return (
            f"{self._model.spec.name} on {topology.world_size} x {self._model.device.type}, {topology.name()}, "
            f"{self._config.training.precision}; {sum(self.trained.values()):,} trainable parameters over the ranks of one copy"
        )

    def of_start(self, iteration: int, total: int) -> dict[str, Any]:
        """What is written once for each start of a run."""
        topology = self._model.topology
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "iteration": iteration,
            "total": total,
            "world": topology.world_size,
            "layout": topology.name(),
            "device": self._gpu,
            "precision": self._config.training.precision,
            "family": self._model.spec.name,
            "trained": self.trained,
            "data": self._loader.report() if self._loader else None,
            "versions": {"megatron_vlm": __version__, "python": platform.python_version()}
            | {name: metadata.version(name) for name in _PACKAGES},
        }

    def of_step(self, result: StepResult, seconds: float, sample_ids: Sequence[int]) -> dict[str, Any]:
        """Model operations a second over all ranks in 1e12, their share of the GPUs' peak where that is known, and, of a
        mixture, the samples of each source in the order of ``data.mixture``.
        """
        frozen = [group for group, number in self.trained.items() if not number]
        flops = Flops(**dict(zip(("vision", "connector", "llm"), result.forward_flops)))
        adapted = [group for group in self.trained if group not in frozen] if self._adapts else []
        tflops = flops.training([*frozen, *adapted], adapted) / seconds / 1e12
        facts: dict[str, Any] = {"tflops": tflops}
        if self._peak:
            facts["mfu"] = tflops / (self._peak * self._model.topology.world_size)
        if self._loader is not None and len(starts := self._loader.source_starts) > 1:
            places = np.searchsorted(starts, np.asarray(sample_ids), side="right") - 1
            facts["sources"] = np.bincount(places, minlength=len(starts)).tolist()
        return facts
