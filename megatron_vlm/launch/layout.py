"""Picks the layout of a run that fits the memory of its GPUs.

RunConfig, model config, number and size of GPUs --candidates, best first--> estimate --> the first that fits
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_vlm.errors import ConfigError
from megatron_vlm.training.memory import RowShape, StageMemory, estimate
from megatron_vlm.training.run_config import RunConfig

USABLE = 0.94
"""Share of a GPU's memory that a run may plan with: the rest is fragmentation and what the driver keeps."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way to lay a run over GPUs, and why it was taken.

    Attributes:
        tp, pp, dp: parallel sizes.
        sequence_parallel, recompute, distributed_optimizer: settings of section ``parallel``.
        micro_batch_size: samples of a row while packing is off.
        accumulation: microbatches of a rank in a step.
        stages: the estimate.
        reason: one line.
    """

    tp: int
    pp: int
    dp: int
    sequence_parallel: bool
    recompute: bool
    distributed_optimizer: bool
    micro_batch_size: int
    accumulation: int
    stages: tuple[StageMemory, ...]
    reason: str

    def apply(self, config: RunConfig) -> RunConfig:
        """``config`` with this layout."""
        parallel = replace(
            config.parallel,
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            sequence_parallel=self.sequence_parallel,
            recompute_granularity="full" if self.recompute else None,
            use_distributed_optimizer=self.distributed_optimizer,
        )
        return replace(
            config, parallel=parallel, training=replace(config.training, micro_batch_size=self.micro_batch_size)
        )


def choose_layout(
    config: RunConfig,
    spec: Any,
    model_config: Any,
    gpus: int,
    bytes_per_gpu: int,
    *,
    device_kind: Literal["cpu", "cuda"] = "cuda",
    row: RowShape | None = None,
) -> Layout:
    """Returns the first candidate, in order of speed, that fits by the estimate.

    Raises:
        ConfigError: none fits; with the one that needs least and what would help.
    """
    smallest: Layout | None = None
    for candidate in _candidates(config, model_config, gpus):
        tried = candidate.apply(config)
        try:
            tried.check_world(gpus)
            stages = tuple(estimate(tried, spec, model_config, gpus, device_kind, row=row))
        except ConfigError:
            continue
        need = max(stage.total for stage in stages)
        found = replace(
            candidate,
            stages=stages,
            reason=f"{candidate.reason}: {need / 2**30:.1f} of {bytes_per_gpu / 2**30:.1f} GiB",
        )
        if need <= USABLE * bytes_per_gpu:
            return found
        if smallest is None or need < max(stage.total for stage in smallest.stages):
            smallest = found
    raise ConfigError(
        f"nothing fits {gpus} GPUs of {bytes_per_gpu / 2**30:.1f} GiB"
        + (f"; the least was tp {smallest.tp} pp {smallest.pp} dp {smallest.dp}, {smallest.reason}" if smallest else "")
    )


def _candidates(config: RunConfig, model_config: Any, gpus: int) -> Iterator[Layout]:
    for recompute in (False, True):
        for model in (size for size in range(1, gpus + 1) if gpus % size == 0):
            for tp in (size for size in range(min(model, 8), 0, -1) if model % size == 0):
                dp, pp = gpus // model, model // tp
                yield Layout(
                    tp=tp,
                    pp=pp,
                    dp=dp,
                    sequence_parallel=tp > 1,
                    recompute=recompute,
                    distributed_optimizer=dp > 1,
                    micro_batch_size=config.training.micro_batch_size,
                    accumulation=config.num_microbatches_per_batch // dp,
                    stages=(),
                    reason=f"tp {tp} pp {pp} dp {dp}{', recomputing' if recompute else ''}",
                )
