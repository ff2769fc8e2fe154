"""What a step costs in time, stage by stage, and pipeline stages that take equally long.

    samples of the data, or an expected row --RowWork: FLOPs of tower, connector, layers, head--> PartWork: of one rank
        --layers of each stage--> StepWork: loads of the stages, time of a step, share of it in which ranks wait

Work is counted in operations of a rank (training/memory/flops.py): a frozen part costs its forward pass, and no gradient flows
below the first part that trains. What ranks exchange counts as the operations that a GPU does meanwhile: few numbers, which
only order layouts and weigh a stage against another.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_vlm.data.stream.glance import glance
from megatron_vlm.data.stream.packing import Costs
from megatron_vlm.data.types import Processor
from megatron_vlm.log import get_logger
from megatron_vlm.models.family_config import FamilyConfig, has_tower
from megatron_vlm.parallel.batch import together
from megatron_vlm.parallel.grid import COPIES, Grid
from megatron_vlm.peft.adapter_map import PeftPlan
from megatron_vlm.training.memory.flops import Flops, counted_flops, forward_flops, passes_of
from megatron_vlm.training.memory.stages import RowShape, StepWork
from megatron_vlm.training.run_config import RunConfig
from megatron_vlm.weights.mapping import GROUPS
from megatron_vlm.weights.stages import spread_virtual

log = get_logger(__name__)

NODE = 8
"""GPUs that share fast links."""
_PER_BYTE = 2000.0
"""Operations of a GPU in the time that a byte takes to another of its node: 400 TFLOP/s, 200 GB/s. Between nodes 8 times that."""
_HELPS, _LONG = 0.9, 1e13
"""Images are encoded ahead where that saves a tenth of a step, of one of more operations of a rank than this: 25 ms."""
_PER_HOST_BYTE = 16_000.0
"""Operations of a GPU in the time that a byte takes over the link to its host: 25 GB/s."""
_PER_HOST_NUMBER = 200_000.0
"""The same of a number whose update is the host's: 6 bytes over its link at 25 GB/s, 28 in its memory at 100 GB/s."""
_MICROBATCH_TOKENS = 512
"""Tokens whose work a microbatch costs a rank beside its own, however it is split: kernels are started one by one."""


@dataclass(frozen=True, kw_only=True)
class RowWork:
    """A microbatch in the mean.

    Attributes:
        flops: of its forward pass.
        tokens: of it.
        source: what it is taken from, in words.
    """

    flops: Flops
    tokens: float
    source: str

    @classmethod
    def of(
        cls,
        config: RunConfig,
        model_config: FamilyConfig,
        row: RowShape | None = None,
        counts: NDArray[Any] | None = None,
    ) -> "RowWork":
        """Of rows of samples ``counts`` (``COUNT_DTYPE``), of ``row`` with a loss on every token, or of ``RowShape.expected``."""
        if counts is not None and len(counts):
            tokens = int(counts["tokens"].sum())
            per_row = len(counts) / config.training.micro_batch_size
            rows = tokens / config.data.seq_length if config.data.packing else per_row
            flops = counted_flops(model_config, config.data, counts).mean(rows)
            return cls(flops=flops, tokens=tokens / rows, source=f"{len(counts)} samples of the data")
        row = row or RowShape.expected(config, model_config)
        tokens = sum(row.segments)
        flops = forward_flops(model_config, images=row.images, segments=row.segments, supervised=tokens)
        return cls(flops=flops, tokens=tokens, source=f"rows of {row}")


@dataclass(frozen=True, kw_only=True)
class PartWork:
    """Of one rank, one microbatch, forward and backward.

    Attributes:
        before: of tower and connector, on the first stage.
        layer: of a decoder layer.
        after: of head and loss, on the last stage.
        ahead: of tower and connector on every rank, where they run before the pipeline does.
    """

    before: float
    layer: float
    after: float
    ahead: float = 0.0

    @classmethod
    def of(
        cls, config: RunConfig, model_config: FamilyConfig, row: RowWork, adapted: Collection[str] | None = None
    ) -> "PartWork":
        """Of ``row`` in the layout of ``config``; ``adapted``: groups with adapters, None where there are none."""
        parallel, text, flops = config.parallel, model_config.text, row.flops
        tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        passes = _passes(config, adapted)
        recomputes, layers = config.model_options.recomputes, flops.llm - flops.head
        images, tower = 0.0, model_config.vision.hidden_size if has_tower(model_config) else text.hidden_size
        for group, again in (("vision", recomputes("tower")), ("connector", recomputes("connector"))):
            images += (passes[group] + (again and passes[group] > 1)) * getattr(flops, group)
        images *= (1.0 if "tp" in parallel.image_axes else _tensor_parallel(tp, tower)) / parallel.image_ranks
        once_more = _recomputed(config, model_config, flops) if passes["llm"] > 1 else 0.0
        per_layer, exchanged = layers * passes["llm"] + once_more, 0.0
        if cp > 1:  # keys and values come to every rank, again in the backward pass, and their gradients go back
            if passes["llm"] > 1 and not recomputes("core_attention"):
                per_layer += flops.attention
            width = 2 if config.training.precision != "fp32" else 4
            tokens = row.tokens * (cp - 1) / cp * text.num_layers
            exchanged = (
                3 * tokens * 2 * text.num_query_groups * text.head_dim * width / tp * _link(Grid(tp=tp, cp=cp).world)
            )
        split = _tensor_parallel(tp, text.hidden_size) / cp
        started, first = _MICROBATCH_TOKENS / row.tokens, parallel.vision_parallel != "ahead"
        images *= 1 + started  # what runs few kernels on a rank has few to start; the decoder's are as many on each
        return cls(
            before=images if first else 0.0,
            layer=(per_layer * (split + started) + exchanged) / text.num_layers,
            after=flops.head * passes["llm"] * split * (1 + started),
            ahead=0.0 if first else images,
        )

    def loads(self, layers: tuple[int, ...], pp: int) -> list[float]:
        """Work of each pipeline rank; ``layers`` of each virtual stage."""
        found = [self.layer * sum(layers[rank::pp]) for rank in range(pp)]
        found[0] += self.before
        found[-1] += self.after
        return found


def _passes(config: RunConfig, adapted: Collection[str] | None) -> dict[str, int]:
    """Over each group of the model, in a step."""
    return passes_of(config.model.freeze) if adapted is None else passes_of(GROUPS, adapted)


def _recomputed(config: RunConfig, model_config: FamilyConfig, flops: Flops) -> float:
    """Operations of the decoder's layers that are done again in the backward pass; of a stage's first layers, in the mean."""
    parallel, text, options = config.parallel, model_config.text, config.model_options
    layers = flops.llm - flops.head
    if parallel.recompute_granularity == "full":
        most = (parallel.recompute_num_layers or text.num_layers) * parallel.pipeline_model_parallel_size
        return layers * min(1.0, most / text.num_layers)
    mlp = 3 * text.ffn_hidden_size
    linears = mlp + 2 * (text.num_attention_heads + text.num_query_groups) * text.head_dim
    found = flops.attention if options.recomputes("core_attention") else 0.0
    return found + ((layers - flops.attention) * mlp / linears if options.recomputes("mlp") else 0.0)


def _link(ranks: int) -> float:
    """Operations in the time of a byte between ``ranks`` neighbours."""
    return _PER_BYTE * (1 if ranks <= NODE else 8)


def _tensor_parallel(tp: int, hidden: int) -> float:
    """Time of layers split over ``tp`` ranks, of that on one: a token's 16 ``hidden`` bytes go through four sums over the ranks
    for 72 ``hidden``^2 operations."""
    return (1 + 16 * _link(tp) / 72 * (tp - 1) / hidden) / tp


def settled(
    config: RunConfig, model_config: FamilyConfig, grid: Grid, adapted: Collection[str] | None = None
) -> RunConfig:
    """The run with ``vision_parallel=auto`` replaced by ``ahead`` where that helps; a function of settings and model alone.

    That is: there are stages; a step of full rows takes at most ``_HELPS`` of its time, and is long enough to tell; and it costs
    little memory: no gradient flows through the tower, or its layers are recomputed, and whole it is no larger than half of what
    a rank holds of the decoder's layers. ``adapted``: as of ``PartWork.of``.
    """
    parallel = config.parallel
    if parallel.vision_parallel != "auto" or grid.pp == 1 or parallel.fully_sharded or not has_tower(model_config):
        return config
    if _passes(config, adapted)["vision"] > 1 and not config.model_options.recomputes("tower"):
        return config
    layer = (
        4 * model_config.vision.hidden_size**2
        + 2 * model_config.vision.hidden_size * model_config.vision.ffn_hidden_size
    )
    text = model_config.text
    attention = 2 * text.hidden_size * (text.num_attention_heads + text.num_query_groups) * text.head_dim
    decoder = text.num_layers * (attention + 3 * text.hidden_size * text.ffn_hidden_size) / (grid.pp * grid.tp)
    if model_config.vision.num_layers * layer > decoder / 2:
        return config
    ahead = config.replace(parallel=parallel.replace(vision_parallel="ahead"))
    first, then = (
        _planned(run, model_config, grid, RowWork.of(run, model_config), adapted)[1].time for run in (config, ahead)
    )
    return ahead if then <= _HELPS * first and first > _LONG else config


def planned(
    config: RunConfig,
    model_config: FamilyConfig,
    grid: Grid,
    *,
    row: RowShape | None = None,
    counts: NDArray[Any] | None = None,
    adapted: Collection[str] | None = None,
) -> tuple[RunConfig, StepWork]:
    """The run ``settled`` and with ``decoder_layers_per_stage=auto`` replaced by the numbers that make its slowest stage as fast
    as can be, and its step; ``row`` and ``counts`` as of ``RowWork.of``, ``adapted`` as of ``PartWork.of``."""
    config = settled(config, model_config, grid, adapted)
    return _planned(config, model_config, grid, RowWork.of(config, model_config, row, counts), adapted)


def _planned(
    config: RunConfig, model_config: FamilyConfig, grid: Grid, work: RowWork, adapted: Collection[str] | None
) -> tuple[RunConfig, StepWork]:
    parallel = config.parallel
    parts = PartWork.of(config, model_config, work, adapted)
    if parallel.decoder_layers_per_stage == "auto":
        beside = [parts.before, *[0.0] * (grid.pp - 2), parts.after]
        num_layers = model_config.text.num_layers
        virtual = parallel.virtual_size(num_layers)
        first = model_config.text.deepstack if virtual > 1 else 0  # virtual stages cannot hand levels on
        found = spread_virtual(num_layers, beside, parts.layer, virtual, first)
        config = config.replace(parallel=parallel.staged(found))
    layers = config.parallel.stage_layers(model_config.text.num_layers)
    each, once = _shared(config, model_config, grid, adapted)
    step = StepWork(
        layers=tuple(sum(layers[rank :: grid.pp]) for rank in range(grid.pp)),
        loads=tuple(max(load, each) + each / 10 for load in parts.loads(layers, grid.pp)),
        microbatches=max(1, config.num_microbatches_per_batch // grid.dp),
        virtual=len(layers) // grid.pp,
        ahead=parts.ahead,
        once=once,
        source=work.source,
    )
    return config, step


def _shared(
    config: RunConfig, model_config: FamilyConfig, grid: Grid, adapted: Collection[str] | None
) -> tuple[float, float]:
    """What shared weights and an optimizer on the host cost: (each microbatch, beside its work but for a tenth; once a step)."""
    parallel, text = config.parallel, model_config.text
    if not (parallel.fully_sharded or parallel.host_share):
        return 0.0, 0.0
    per_layer = 2 * (text.num_attention_heads + text.num_query_groups) * text.head_dim + 3 * text.ffn_hidden_size
    numbers = {"llm": text.hidden_size * (text.num_layers * per_layer + 2 * text.vocab_size)}
    if has_tower(model_config):
        tower = model_config.vision
        numbers["vision"] = tower.num_layers * (4 * tower.hidden_size + 2 * tower.ffn_hidden_size) * tower.hidden_size
    passes = _passes(config, adapted)
    held = sum(numbers.values()) / grid.tp / grid.pp
    trained = sum(count for group, count in numbers.items() if passes[group] == 3) / grid.tp / grid.pp
    copies, each = grid.size(*COPIES), 0.0
    if parallel.fully_sharded:  # weights come, twice where no layer keeps them; gradients go
        gathers, width = (
            1 + (parallel.data_parallel_sharding == "parameters"),
            2 + 2 * (config.training.precision == "fp32"),
        )
        each = (copies - 1) / copies * _link(grid.size("tp", *COPIES)) * (gathers * width * held + 4 * trained)
        if parallel.offloads_parameters:  # this rank's part comes as often, in fp32 where it trains; its gradients go
            each += _PER_HOST_BYTE / copies * (gathers * (width * held + (4 - width) * trained) + 4 * trained)
    owned = trained if parallel.data_parallel_sharding == "none" else trained / copies
    return each, _PER_HOST_NUMBER * parallel.host_share * owned


def balanced(
    config: RunConfig, model_config: FamilyConfig, processor: Processor, plan: PeftPlan | None, device: torch.device
) -> RunConfig:
    """The run with ``auto`` settled by a few samples of the data, which rank 0 looks at for all. A collective where it is.

    Raises:
        MegatronVLMError: on every rank: the data cannot be read.
    """
    grid, adapted = config.parallel.grid(dist.get_world_size()), plan.groups if plan else None
    config = settled(config, model_config, grid, adapted)
    if config.parallel.decoder_layers_per_stage != "auto":
        return config
    found: list[Any] = [None]
    with together(device):
        if dist.get_rank() == 0:
            data = config.data
            counts = glance(data, processor, data.train or data.valid, config.training.seed)
            run, step = planned(config, model_config, grid, counts=counts, adapted=adapted)
            log.info("decoder layers of each stage: %s; %s", ", ".join(map(str, step.layers)), step)
            found = [run.parallel.decoder_layers_per_stage]
    dist.broadcast_object_list(found, src=0, device=device)
    return config.replace(parallel=config.parallel.staged(found[0]))


def costs_of(config: RunConfig, model_config: FamilyConfig, plan: PeftPlan | None) -> Costs:
    """What each sample costs a replica, tower and frozen parts as they are: operations of its step."""
    frozen, adapted = (GROUPS, plan.groups) if plan else (config.model.freeze, ())
    return lambda counts: counted_flops(model_config, config.data, counts).training(frozen, adapted)
