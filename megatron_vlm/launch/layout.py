"""Picks the layout of a run that fits the memory of its GPUs.

    RunConfig, model config, number and size of GPUs --candidates, fastest first--> estimate --> the first that fits

What a layout costs in speed is told by a few numbers that only order the candidates: a doubling of tensor parallel ranks,
recomputation (a second forward pass), the bubble of a pipeline, and what a microbatch costs however short it is.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_vlm.errors import ConfigError
from megatron_vlm.launch.checks import GIB
from megatron_vlm.launch.devices import Devices
from megatron_vlm.models.family_config import FamilyConfig
from megatron_vlm.models.parts.decoder import check_tensor_parallel
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.grid import SETTINGS, Grid
from megatron_vlm.registry import FamilySpec
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.training.memory.stages import RowShape, StageMemory, table
from megatron_vlm.training.run_config import RunConfig

USABLE = 0.94
"""Share of a GPU's memory that a run may plan with: the rest is fragmentation and rows larger than expected."""
_TENSOR_DOUBLING = 1.1  # time of a step, relative
_RECOMPUTE = 4 / 3  # three passes of work become four
_MICROBATCH_TOKENS = 512  # that a microbatch costs beside its own
_MAX_TP = 8  # GPUs that share fast links
_SHOWN = 4  # reasons


_KEPT = ("recompute_granularity", "data_parallel_sharding")
_MICRO_BATCHES = (1, 2, 4, 8, 16)


class NothingFits(ConfigError):
    """Layouts there are, but none that fits the memory."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way to lay a run over GPUs, and why it was taken.

    Attributes:
        tp, pp, dp: parallel sizes.
        sequence_parallel, recompute, distributed_optimizer: settings of section ``parallel``.
        micro_batch_size: samples of a row while packing is off.
        accumulation: microbatches of a rank in a step.
        tokens: of a microbatch, at most.
        stages: the estimate, of the first and the last stage; of a layout that cannot fit, without activations.
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
    tokens: int
    stages: tuple[StageMemory, ...] = ()
    reason: str = ""

    @property
    def name(self) -> str:
        """Sizes above 1, recomputation, and samples of a row where there are several."""
        sizes = [f"{axis} {size}" for axis in ("tp", "pp", "dp") if (size := getattr(self, axis)) > 1]
        rows = f", micro-batch {self.micro_batch_size}" if self.micro_batch_size > 1 else ""
        return " ".join(sizes or ["one rank"]) + (", recomputing" if self.recompute else "") + rows

    @property
    def need(self) -> int:
        """Bytes that the fullest GPU must have."""
        return max(stage.total for stage in self.stages)

    @property
    def slowness(self) -> float:
        """Time of a step, relative to one of endless rows without tensor parallelism, pipeline and recomputation."""
        cost = _TENSOR_DOUBLING ** (self.tp.bit_length() - 1) * (_RECOMPUTE if self.recompute else 1.0)
        cost *= 1 + _MICROBATCH_TOKENS / self.tokens
        return cost * (1 + (self.pp - 1) / self.accumulation)

    def apply(self, config: RunConfig) -> RunConfig:
        """``config`` with this layout."""
        parallel = replace(
            config.parallel,
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            num_layers_per_virtual_pipeline_stage=None,
            sequence_parallel=self.sequence_parallel,
            recompute_granularity="full" if self.recompute else None,
            data_parallel_sharding="optimizer" if self.distributed_optimizer else "none",
        )
        training = replace(config.training, micro_batch_size=self.micro_batch_size)
        return replace(config, parallel=parallel, training=training)


def choose_layout(
    config: RunConfig,
    spec: FamilySpec,
    model_config: FamilyConfig,
    gpus: int,
    bytes_per_gpu: int,
    *,
    device_kind: Literal["cpu", "cuda"] = "cuda",
    row: RowShape | None = None,
    config_for: Callable[[int], RunConfig] | None = None,
    micro_batch_sizes: Sequence[int] = (),
) -> Layout:
    """Returns the first candidate, in order of speed, that fits by the estimate.

    Args:
        config: the run; the sizes of its layout are not looked at.
        spec, model_config: the model.
        gpus, bytes_per_gpu: what there is.
        device_kind: what a "GPU" is.
        row: a microbatch; None: ``RowShape.expected``.
        config_for: the run at a data parallel size, where its global batch depends on it; None: ``config``.
        micro_batch_sizes: sizes to choose among; empty: the config's own.

    Raises:
        NothingFits: with the layout that needs least, what takes most of it, and what would help.
        ConfigError: no layout goes with model and batch, with the reasons; or a setting that is wrong in any of them.
    """

    refused: list[Layout] = []
    found_out: dict[str, str] = {}
    there = candidates(config, model_config, gpus, config_for, micro_batch_sizes, left_out=found_out)
    if not there:
        raise ConfigError(_none_divides(config, gpus, found_out))
    for candidate in there:
        tried = candidate.apply(config_for(candidate.dp) if config_for else config)
        ends = sorted({0, candidate.pp - 1})
        for trace in (False, True):  # what stays between steps is known at once, and often enough
            stages = _estimate(tried, spec, model_config, gpus, device_kind, row=row, stages=ends, trace=trace)
            found = replace(candidate, stages=tuple(stages))
            if found.need > USABLE * bytes_per_gpu:
                refused.append(found)
                break
        else:
            return replace(found, reason=_reason(found, refused, bytes_per_gpu))
    raise NothingFits(_nothing_fits(refused, gpus, bytes_per_gpu))


def candidates(
    config: RunConfig,
    model_config: FamilyConfig,
    gpus: int,
    config_for: Callable[[int], RunConfig] | None = None,
    micro_batch_sizes: Sequence[int] = (),
    *,
    left_out: dict[str, str] | None = None,
) -> list[Layout]:
    """All layouts of ``gpus`` ranks that the model and the batch divide over, fastest first.

    ``left_out`` gets the others, by name, with why: one that contradicts the batch per device, say, is no candidate.
    """
    left_out = {} if left_out is None else left_out
    found = []
    for grid, recompute in itertools.product(Grid.all(gpus), (False, True)):
        tp, pp, dp = grid.tp, grid.pp, grid.dp
        if tp > _MAX_TP:
            continue
        try:
            run = config_for(dp) if config_for else config
        except ConfigError as error:
            left_out.setdefault(f"tp {tp} pp {pp} dp {dp}", str(error))
            continue
        for micro in micro_batch_sizes or (run.training.micro_batch_size,):
            layout = Layout(
                tp=tp,
                pp=pp,
                dp=dp,
                sequence_parallel=tp > 1,
                recompute=recompute,
                distributed_optimizer=dp > 1,
                micro_batch_size=micro,
                accumulation=max(1, run.training.global_batch_size // (micro * dp)),
                tokens=run.data.seq_length * micro,
            )
            try:
                _check(layout, run, model_config, gpus)
            except ConfigError as error:
                left_out.setdefault(layout.name, str(error))
            else:
                found.append(layout)
    return sorted(found, key=lambda layout: (layout.slowness, layout.pp, layout.tp))


def _estimate(*args: Any, **kwargs: Any) -> list[StageMemory]:
    """``training.memory.estimate.estimate``."""
    from megatron_vlm.training.memory.estimate import (
        estimate,  # loads megatron-core: a wrong command need not wait for it
    )

    return estimate(*args, **kwargs)


def _check(layout: Layout, config: RunConfig, model_config: FamilyConfig, gpus: int) -> None:
    """Raises ConfigError where model or batch do not divide over the layout."""
    layout.apply(config).check_world(gpus)
    check_tensor_parallel(model_config.text, layout.tp)
    layout.apply(config).parallel.virtual_size(model_config.text.num_layers)


def _reason(found: Layout, refused: Sequence[Layout], limit: int) -> str:
    share = f"{found.need / GIB:.1f} of {limit / GIB:.0f} GiB"
    if not refused:
        return f"{found.name}: the fastest, {share}"
    faster = min(refused, key=lambda layout: layout.slowness)
    most = max(faster.stages, key=lambda stage: stage.total)
    return (
        f"{found.name}: {share}; {faster.name} would need at least {faster.need / GIB:.1f} GiB, of which {most.largest} "
        f"{getattr(most, most.largest) / GIB:.1f}"
    )


def _none_divides(config: RunConfig, gpus: int, left_out: Mapping[str, str]) -> str:
    reasons: dict[str, str] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, name)
    listed = "".join(f"\n  {name}: {reason}" for reason, name in itertools.islice(reasons.items(), _SHOWN))
    return (
        f"no layout of {gpus} ranks divides the model and training.global_batch_size {config.training.global_batch_size}: "
        f"set it to a multiple of micro_batch_size x {gpus}{listed}"
    )


def _nothing_fits(refused: Sequence[Layout], gpus: int, limit: int) -> str:
    least = min(refused, key=lambda layout: layout.need)
    most = max(least.stages, key=lambda stage: stage.total)
    advice = {
        "weights": "keep the frozen weights in 4 bits (peft.quantize=nf4)",
        "gradients": "train adapters (peft.target_modules) or freeze parts of the model",
        "optimizer": "train adapters (peft.target_modules) or freeze parts of the model",
        "activations": "lower data.seq_length or set data.max_patches_per_row",
        "temporary": "lower data.seq_length or set data.max_patches_per_row",
        "constant": "use GPUs with more memory",
    }[most.largest]
    return (
        f"nothing fits {gpus} GPU{'s' if gpus > 1 else ''} of {limit / GIB:.1f} GiB: the least, {least.name}, needs at least "
        f"{least.need / GIB:.1f} GiB, of which {most.largest} {getattr(most, most.largest) / GIB:.1f}. Use more GPUs, or {advice}"
    )


def lay_out(
    run: dict[str, Any],
    config: RunConfig,
    source: WeightSource,
    devices: Devices,
    world: int,
    config_for: Callable[[int], RunConfig],
    fixed_micro: bool,
) -> tuple[RunConfig, Sequence[StageMemory], str]:
    """The run with a layout that fits, its estimate, and why: the sizes that are named, else the fastest that fits.

    Raises:
        NothingFits: that, or no other layout, fits the memory.
        ConfigError: a setting that is wrong, or a batch that no layout divides.
    """

    parallel = run.get("parallel") or {}
    if any(name in parallel for name in SETTINGS.values()):
        config.check_world(world)
        stages = _estimate(config, source.spec, source.config, world, devices.kind)
        need = max(stage.total for stage in stages)
        words = f"as named, {need / GIB:.2f} of {devices.memory / GIB:.1f} GiB"
        if need > USABLE * devices.memory:
            raise NothingFits(f"too little memory: {words} a rank\n" + "\n".join(table(stages)))
        return config, stages, words
    layout = choose_layout(
        config,
        source.spec,
        source.config,
        world,
        devices.memory,
        device_kind=devices.kind,
        config_for=config_for,
        micro_batch_sizes=() if fixed_micro or config.data.packing else _MICRO_BATCHES,
    )
    chosen = layout.apply(config_for(layout.dp))
    default = ParallelConfig()  # what is asked for costs no memory
    asked = {name: value for name in _KEPT if (value := getattr(config.parallel, name)) != getattr(default, name)}
    if any(getattr(chosen.parallel, name) != value for name, value in asked.items()):
        chosen = chosen.replace(parallel=chosen.parallel.replace(**asked))
        return chosen, _estimate(chosen, source.spec, source.config, world, devices.kind), layout.reason
    return chosen, layout.stages, layout.reason


def as_flags(config: RunConfig, reason: str) -> str:
    """The layout of a run as a command line says it, and why it was taken."""
    sizes = [getattr(config.parallel, SETTINGS[axis]) for axis in ("tp", "pp")]
    words = ["--tensor-model-parallel-size {} --pipeline-model-parallel-size {}".format(*sizes)]
    words += ["--use-distributed-optimizer"] if config.parallel.data_parallel_sharding == "optimizer" else []
    words += ["--recompute-granularity full"] if config.parallel.recompute_granularity else []
    return f"{' '.join(words)} ({reason})"
