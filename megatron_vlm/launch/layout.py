"""Picks the layout of a run that fits the memory of its GPUs.

    RunConfig, model config, number and size of GPUs --candidates, fastest first--> estimate --> the first that fits

A candidate is the run itself in that layout. How long a step of it takes is training/balance.py's to tell, what memory it needs
training/memory/estimate.py's: nothing here knows what a layout costs.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any, Literal

from numpy.typing import NDArray

from megatron_vlm.errors import ConfigError
from megatron_vlm.launch.checks import GIB
from megatron_vlm.launch.devices import Devices
from megatron_vlm.models.family_config import FamilyConfig
from megatron_vlm.models.parts.decoder import check_tensor_parallel
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.grid import COPIES, SETTINGS, Grid
from megatron_vlm.peft.select import make_plan
from megatron_vlm.registry import FamilySpec
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.training.balance import NODE, StepWork, planned
from megatron_vlm.training.memory.stages import RowShape, StageMemory, table
from megatron_vlm.training.run_config import RunConfig

USABLE = 0.94
"""Share of a GPU's memory that a run may plan with: the rest is fragmentation and rows larger than expected."""
CONTEXT_TOKENS = 4096
"""Tokens of a row that are left to a rank, at least, where the search splits rows: shorter ones start kernels for nothing."""
_SHOWN = 4  # reasons
_MICRO_BATCHES = (1, 2, 4, 8, 16)


class NothingFits(ConfigError):
    """Layouts there are, but none that fits the memory."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way to lay a run over GPUs, and why it was taken.

    Attributes:
        config: the run in this layout; ``auto`` replaced by layers of each stage.
        grid: of its ranks.
        step: its time, as predicted.
        stages: the estimate, of those stages that can be the fullest; of a layout that cannot fit, without activations.
        reason: one line.
    """

    config: RunConfig
    grid: Grid
    step: StepWork
    stages: tuple[StageMemory, ...] = ()
    reason: str = ""

    @property
    def name(self) -> str:
        """Sizes above 1, recomputation, what is on the host, and samples of a row where there are several."""
        micro, parallel = self.config.training.micro_batch_size, self.config.parallel
        sizes = [f"{axis} {size}" for axis in ("tp", "cp", "pp", "dp") if (size := getattr(self.grid, axis)) > 1]
        rows = f", micro-batch {micro}" if micro > 1 else ""
        count = parallel.recompute_num_layers
        recomputing = ", recomputing" + (f" {count} layers" if count else "") if parallel.recompute_granularity else ""
        share = "" if parallel.host_share == 1 else f"{parallel.host_share:.0%} of "
        host = f", {share}the optimizer on the host" if parallel.host_share else ""
        host = ", weights and optimizer on the host" if parallel.offloads_parameters else host
        sharded = f", {parallel.data_parallel_sharding} sharded" if parallel.fully_sharded else ""
        return " ".join(sizes or ["one rank"]) + sharded + recomputing + host + rows

    @property
    def need(self) -> int:
        """Bytes that the fullest GPU must have."""
        return max(stage.total for stage in self.stages)


def choose_layout(
    config: RunConfig,
    spec: FamilySpec,
    model_config: FamilyConfig,
    gpus: int,
    bytes_per_gpu: int,
    *,
    device_kind: Literal["cpu", "cuda"] = "cuda",
    row: RowShape | None = None,
    counts: NDArray[Any] | None = None,
    config_for: Callable[[int], RunConfig] | None = None,
    micro_batch_sizes: Sequence[int] = (),
) -> Layout:
    """Returns the first candidate, in order of predicted time, that fits by the estimate.

    Args:
        config: the run; the sizes of its layout are not looked at, recomputation and a distributed optimizer that are on stay.
        spec, model_config: the model.
        gpus, bytes_per_gpu: what there is.
        device_kind: what a "GPU" is.
        row: a microbatch, for memory; None: ``RowShape.expected``.
        counts: of samples of the data (``COUNT_DTYPE``), for time; None: ``row``.
        config_for: the run at a data parallel size, where its global batch depends on it; None: ``config``.
        micro_batch_sizes: sizes to choose among; empty: the config's own.

    Raises:
        NothingFits: with the layout that needs least, what takes most of it, and what would help.
        ConfigError: no layout goes with model and batch, with the reasons; or a setting that is wrong in any of them.
    """

    refused: list[Layout] = []
    found_out: dict[str, str] = {}
    there = candidates(
        config,
        model_config,
        gpus,
        config_for,
        micro_batch_sizes,
        row=row,
        counts=counts,
        adapted=adapted_groups(config, spec, model_config),
        left_out=found_out,
    )
    if not there:
        raise ConfigError(_none_divides(config, gpus, found_out))
    lasting: dict[Any, tuple[StageMemory, ...]] = {}  # cp and recomputation change nothing of what stays between steps
    for candidate in there:
        # In flight are most rows on the first stage, most layers on the second, and on the last is the head.
        fullest = sorted({0, min(1, candidate.grid.pp - 1), candidate.grid.pp - 1})
        parallel = candidate.config.parallel
        kept = (parallel.data_parallel_sharding, parallel.offload, parallel.vision_parallel)
        same = (candidate.grid.tp, candidate.grid.pp, candidate.step.layers, kept)

        def estimated(tried: RunConfig, trace: bool, fullest: list[int] = fullest) -> tuple[StageMemory, ...]:
            how: dict[str, Any] = dict(row=row, stages=fullest, trace=trace)
            return tuple(_memory().estimate(tried, spec, model_config, gpus, device_kind, **how))

        for trace in (False, True):  # what stays between steps is known at once, and often enough
            stages = lasting.get(same) if not trace else None
            stages = stages or estimated(candidate.config, trace)
            if not trace:
                lasting[same] = stages
            found = replace(candidate, stages=stages)
            if found.need > USABLE * bytes_per_gpu:
                refused.append(found)
                break
        else:
            adapted = adapted_groups(config, spec, model_config)
            plan = partial(planned, model_config=model_config, grid=found.grid, row=row, counts=counts, adapted=adapted)
            found = _with_less(found, config, plan, partial(estimated, trace=True), USABLE * bytes_per_gpu)
            return replace(found, reason=_reason(found, refused, bytes_per_gpu))
    raise NothingFits(_nothing_fits(refused, gpus, bytes_per_gpu))


def _with_less(
    found: Layout,
    asked: RunConfig,
    plan: Callable[[RunConfig], tuple[RunConfig, StepWork]],
    estimated: Callable[[RunConfig], tuple[StageMemory, ...]],
    limit: float,
) -> Layout:
    """A layout that fits with fewer layers recomputed, or less of the optimizer on the host, where the search chose these."""
    parallel, choices = found.config.parallel, list[dict[str, Any]]()
    if parallel.recompute_granularity == "full" and asked.parallel.recompute_granularity is None:
        most = max(found.step.layers) // found.step.virtual
        counts = {most * quarters // 4 for quarters in (1, 2, 3)} - {0}
        choices += [dict(recompute_num_layers=count) for count in sorted(counts)]
    if parallel.offload != asked.parallel.offload and not parallel.offloads_parameters:
        choices += [dict(offload_fraction=share) for share in (0.25, 0.5, 0.75)]
    done: set[str] = set()
    for choice in choices:
        ((name, _),) = choice.items()
        if name in done:
            continue
        tried, step = plan(found.config.replace(parallel=found.config.parallel.replace(**choice)))
        less = replace(found, config=tried, step=step, stages=estimated(tried))
        if less.need <= limit:
            found = less
            done.add(name)
    return found


def candidates(
    config: RunConfig,
    model_config: FamilyConfig,
    gpus: int,
    config_for: Callable[[int], RunConfig] | None = None,
    micro_batch_sizes: Sequence[int] = (),
    *,
    row: RowShape | None = None,
    counts: NDArray[Any] | None = None,
    adapted: Collection[str] | None = None,
    left_out: dict[str, str] | None = None,
) -> list[Layout]:
    """All layouts of ``gpus`` ranks that the model and the batch divide over, fastest first.

    ``left_out`` gets the others, by name, with why: one that contradicts the batch per device, say, is no candidate.
    ``adapted``: see ``PartWork.of``; the others as of ``choose_layout``.
    """
    left_out = {} if left_out is None else left_out
    found = []
    for grid in Grid.all(gpus):
        if grid.tp > NODE:
            continue
        try:
            run = config_for(grid.dp) if config_for else config
            check_tensor_parallel(model_config.text, grid.tp)
            ways = list(_ways(run.parallel, grid))
        except ConfigError as error:
            left_out.setdefault(grid.name(), str(error))
            continue
        for micro, parallel in itertools.product(micro_batch_sizes or (run.training.micro_batch_size,), ways):
            if grid.cp > 1 and run.data.seq_length * micro < CONTEXT_TOKENS * grid.cp:
                continue
            try:
                tried = run.replace(parallel=parallel, training=run.training.replace(micro_batch_size=micro))
                tried.check_world(gpus)
                tried, step = planned(tried, model_config, grid, row=row, counts=counts, adapted=adapted)
            except ConfigError as error:
                left_out.setdefault(f"{grid.name()} micro-batch {micro}", str(error))
            else:
                found.append(Layout(config=tried, grid=grid, step=step))

    def order(layout: Layout) -> tuple[Any, ...]:
        # A machine's processor takes as long for an update as its GPU for many rows: the host is the last resort.
        # Weights that travel for each row cost what the predicted time does not know: only where nothing fits without.
        parallel = layout.config.parallel
        return (
            ("none", "optimizer", "optimizer+parameters").index(parallel.offload),
            parallel.fully_sharded,
            layout.step.time,
            layout.grid.pp,
            layout.grid.cp,
            layout.grid.tp,
        )

    return sorted(found, key=order)


def _ways(parallel: ParallelConfig, grid: Grid) -> Iterator[ParallelConfig]:
    """The settings of a grid's candidates: all that the search may decide, and what was asked for."""
    asked, copies = parallel.data_parallel_sharding, grid.size(*COPIES)
    shardings: tuple[str, ...] = (asked,)
    never = grid.pp > 1 or parallel.ddp_bucket_size or parallel.vision_parallel == "ahead"  # are weights cut
    if asked == "none" and copies > 1:
        shardings = ("optimizer",) if never else ("optimizer", "parameters")
    elif parallel.fully_sharded and copies == 1 and not parallel.offloads_parameters:
        shardings = ("none",)
    recomputes = (None, "full") if parallel.recompute_granularity is None else (parallel.recompute_granularity,)
    offloads = ("none", "optimizer") if parallel.offload == "none" else (parallel.offload,)
    ways = list(itertools.product(offloads, shardings))
    if asked in ("none", "parameters") and parallel.offload == "none" and not never:
        ways.append(("optimizer+parameters", "parameters"))  # the last resort, on one rank too
    for recompute, (offload, sharding) in itertools.product(recomputes, ways):
        yield parallel.replace(
            **{SETTINGS[axis]: getattr(grid, axis) for axis in SETTINGS},
            decoder_layers_per_stage="auto" if grid.pp > 1 else None,
            decoder_first_pipeline_num_layers=None,
            decoder_last_pipeline_num_layers=None,
            num_layers_per_virtual_pipeline_stage=None,
            sequence_parallel=grid.tp > 1,
            recompute_granularity=recompute,
            offload=offload,
            data_parallel_sharding=sharding,
        )


def adapted_groups(config: RunConfig, spec: FamilySpec, model_config: FamilyConfig) -> Collection[str] | None:
    """Groups of the model with adapters, all else frozen; None: there are no adapters."""
    if not config.peft.active:
        return None
    return make_plan(spec, model_config, config.peft, _memory().full_shapes(spec, model_config)).groups


def _memory() -> ModuleType:
    """``training.memory.estimate``."""
    from megatron_vlm.training.memory import estimate  # loads megatron-core: a wrong command need not wait for it

    return estimate


def _reason(found: Layout, refused: Sequence[Layout], limit: int) -> str:
    idle = f", {found.step.idle:.0%} idle" if found.grid.pp > 1 else ""
    share = f"{found.need / GIB:.1f} of {limit / GIB:.0f} GiB{idle}"
    if not refused:
        return f"{found.name}: the fastest, {share}"
    faster = refused[0]
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
    counts: NDArray[Any] | None = None,
) -> tuple[RunConfig, Sequence[StageMemory], list[str], str]:
    """The run in a layout that fits: the sizes that are named, else the fastest that fits; ``counts``: as of ``choose_layout``.

    Returns:
        The run, the estimate of every stage, a table of them, and why in a line.

    Raises:
        NothingFits: that, or no other layout, fits the memory.
        ConfigError: a setting that is wrong, or a batch that no layout divides.
    """

    spec, model_config = source.spec, source.config
    if any(name in (run.get("parallel") or {}) for name in SETTINGS.values()):
        config.check_world(world)
        adapted, grid = adapted_groups(config, spec, model_config), config.parallel.grid(world)
        config, step = planned(config, model_config, grid, counts=counts, adapted=adapted)
        stages = _memory().estimate(config, spec, model_config, world, devices.kind)
        need = max(stage.total for stage in stages)
        words = f"as named, {need / GIB:.2f} of {devices.memory / GIB:.1f} GiB"
        if need > USABLE * devices.memory:
            raise NothingFits(f"too little memory: {words} a rank\n" + "\n".join(table(stages, step)))
        return config, stages, table(stages, step), words
    layout = choose_layout(
        config,
        spec,
        model_config,
        world,
        devices.memory,
        device_kind=devices.kind,
        counts=counts,
        config_for=config_for,
        micro_batch_sizes=() if fixed_micro or config.data.packing else _MICRO_BATCHES,
    )
    stages = list(layout.stages)
    if len(stages) < layout.grid.pp:
        stages = _memory().estimate(layout.config, spec, model_config, world, devices.kind)
    return layout.config, stages, table(stages, layout.step), layout.reason


def as_flags(config: RunConfig, reason: str) -> str:
    """The layout of a run as a command line says it, and why it was taken."""
    parallel = config.parallel
    sizes = [getattr(parallel, SETTINGS[axis]) for axis in ("tp", "pp")]
    words = ["--tensor-model-parallel-size {} --pipeline-model-parallel-size {}".format(*sizes)]
    cp, count, share = parallel.context_parallel_size, parallel.recompute_num_layers, parallel.host_share
    words += [f"--context-parallel-size {cp}"] if cp > 1 else []
    sharding = parallel.data_parallel_sharding
    words += ["--use-distributed-optimizer"] if sharding == "optimizer" else []
    words += [f"--data-parallel-sharding {sharding}"] if parallel.fully_sharded else []
    words += [f"--recompute-granularity {parallel.recompute_granularity}"] if parallel.recompute_granularity else []
    words += [f"--recompute-num-layers {count}"] if count else []
    words += [f"--offload {parallel.offload}"] if share else []
    words += [f"--offload-fraction {share:g}"] if 0 < share < 1 else []
    return f"{' '.join(words)} ({reason})"
