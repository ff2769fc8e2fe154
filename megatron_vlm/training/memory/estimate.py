"""Memory of one rank of each pipeline stage, before anything runs.

    RunConfig + model config --fake process group, real stage modules on meta--> weights, gradients, optimizer
        + row --memory_trace: real forward and backward pass without data--> activations of the microbatches in flight

So a family, a layout or an adapter is never described twice: what is counted is what the training code makes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_vlm.data.row import Row
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.built import Model, build_model, global_named_parameters, global_parameters
from megatron_vlm.models.family_config import FamilyConfig, has_tower
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.parallel import cpu
from megatron_vlm.parallel.batch import own_tokens
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.grid import AXES, STAGE
from megatron_vlm.parallel.rng import seed_step
from megatron_vlm.parallel.topology import Topology, build_topology, destroy_topology
from megatron_vlm.peft import qlora
from megatron_vlm.peft.lora import apply_lora
from megatron_vlm.peft.select import make_plan
from megatron_vlm.registry import FamilySpec
from megatron_vlm.training.ahead import note_trained
from megatron_vlm.training.balance import planned
from megatron_vlm.training.memory.ahead import AheadBytes, ahead_bytes, bytes_of_sums, encoded
from megatron_vlm.training.memory.sharded import Sharding, cut_bytes
from megatron_vlm.training.memory.stages import RowShape, StageMemory
from megatron_vlm.training.memory.trace import ChunkBytes, measure_chunk
from megatron_vlm.training.optimizer.host import PIECE, on_host
from megatron_vlm.training.run_config import RunConfig
from megatron_vlm.weights.mapping import GROUPS, TensorInfo, group_of
from megatron_vlm.weights.nf4.tensor import Quantization
from megatron_vlm.weights.safetensors_io import PARAMS_DTYPES

_CUDA_CONTEXT = 600 << 20  # CUDA's context and loaded kernels
_NCCL_GROUP = 150 << 20  # buffers of a communicator


def estimate(
    config: RunConfig,
    spec: FamilySpec,
    model_config: FamilyConfig,
    world_size: int,
    device_kind: Literal["cpu", "cuda"],
    *,
    row: RowShape | None = None,
    stages: Sequence[int] | None = None,
    trace: bool = True,
) -> list[StageMemory]:
    """Estimates one rank of each pipeline stage.

    The process must be without a process group; it gets the CPU seams, so it cannot train on a GPU afterwards.

    Args:
        config: the run; ``checkpoint.load`` is not read.
        spec, model_config: the model's family and configuration.
        world_size: ranks of the run.
        device_kind: where the run would be.
        row: a microbatch; None: ``RowShape.expected``.
        stages: numbers of those to estimate; None: all.
        trace: False: only what stays between steps, which takes no time.

    Raises:
        ConfigError: the sizes do not fit the world or the model.
    """
    if dist.is_initialized():
        raise ConfigError("memory is estimated in a process without a process group: start it alone, without torchrun")
    config.check_world(world_size)
    row = row or RowShape.expected(config, model_config)
    grid = config.parallel.grid(world_size)
    infos = full_shapes(spec, model_config) if config.peft.active else {}
    adapted = make_plan(spec, model_config, config.peft, infos).groups if config.peft.active else None
    config, _ = planned(config, model_config, grid, row=row, adapted=adapted)
    reports = []
    for stage in range(grid.pp) if stages is None else stages:
        with _World(config.parallel, model_config, world_size, grid.rank(pp=stage)) as topology:
            model = build_on_meta(config, spec, model_config, topology, infos)
            reports.append(_report(config, model, row if trace else None, device_kind))
    return reports


class _World:
    """A topology of ``world_size`` ranks, of which this process is one and the others are not there."""

    def __init__(self, parallel: ParallelConfig, model_config: FamilyConfig, world_size: int, rank: int):
        self.parallel, self.layers, self.size, self.rank = parallel, model_config.text.num_layers, world_size, rank

    def __enter__(self) -> Topology:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        cpu.install()
        dist.init_process_group("fake", store=FakeStore(), rank=self.rank, world_size=self.size)
        try:
            topology = build_topology(self.parallel, num_layers=self.layers, device=torch.device("cpu"))
            seed_step(topology, 0, 0)
            return topology
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *unused: Any) -> None:
        destroy_topology()
        dist.destroy_process_group()


def build_on_meta(
    config: RunConfig, spec: FamilySpec, model_config: FamilyConfig, topology: Topology, infos: Mapping[str, TensorInfo]
) -> Model:
    """The model as the trainer builds it, without data; ``infos`` of ``full_shapes`` where ``config.peft`` acts."""
    with torch.device("meta"):
        model = build_model(spec, model_config, topology, config.model_options)
    if config.peft.active:
        model = adapt(config, model, infos)
    for stage in model:
        stage.train()
    return model


def adapt(config: RunConfig, model: Model, infos: Mapping[str, TensorInfo]) -> Model:
    """Quantises (on meta alone) and adds pairs to ``model`` as ``config.peft`` says."""
    peft, options = config.peft, model.options
    plan = make_plan(model.spec, model.config, peft, infos)
    if peft.quantize is not None:
        source: Any = SimpleNamespace(mapping=model.mapping, infos=infos, quantization=None)
        shapes = {name: parameter.shape for name, parameter in global_parameters(model).items()}
        quantization = Quantization(
            dtype=options.params_dtype, double_quant=peft.double_quant, groups=peft.quantize_groups
        )
        for name, linear in qlora.take_weights(model, source, quantization, plan.saved).items():
            codes, values = _nf4(shapes[name], PARAMS_DTYPES[options.params_dtype], peft.double_quant)
            qlora.install(linear, codes, values)
    return apply_lora(model, plan, config.training.seed)


class _Nf4Shape(nn.Module):
    """Stands for ``weights.nf4.shard.Nf4Weight``: what is held beside the codes, and what they are dequantised to."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, scales: int):
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8, device="meta"), persistent=False)

    def values(self, codes: Tensor) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def _nf4(shape: torch.Size, dtype: torch.dtype, double_quant: bool) -> tuple[Tensor, Any]:
    """Codes of 4 bits, and scales: of each 64 values 4 bytes, or one and 8 for each 256 of them."""
    blocks = -(-shape.numel() // 64)
    scales = blocks + 8 * -(-blocks // 256) if double_quant else 4 * blocks
    return torch.empty(blocks * 32, dtype=torch.uint8, device="meta"), _Nf4Shape(shape, dtype, scales)


def full_shapes(spec: FamilySpec, model_config: FamilyConfig) -> dict[str, TensorInfo]:
    """Infos of the model's whole tensors by global name, as of a WeightSource, without one."""
    with _World(ParallelConfig(), model_config, 1, 0) as topology, torch.device("meta"):
        model = build_model(spec, model_config, topology, ModelOptions(make_vocab_size_divisible_by=1))
        return {name: TensorInfo.of(parameter) for name, parameter in global_parameters(model).items()}


def _report(config: RunConfig, model: Model, row: RowShape | None, device_kind: Any) -> StageMemory:
    topology = model.topology
    note_trained(model)
    parallel = config.parallel
    held, trained = dict.fromkeys(GROUPS, 0), dict.fromkeys(GROUPS, 0)
    weights = gradients = 0
    updated: list[Tensor] = []
    grad_width = None if parallel.accumulate_allreduce_grads_in_fp32 else "own"
    sharding = _sharding(config, topology, device_kind)
    for chunk in model:
        chunk.lockstep = sharding is not None
        weights += cut_bytes(chunk.buffers(), sharding)
        for name, p in global_named_parameters(chunk):
            held[group_of(name)] += p.numel()
            numel = sharding.numel(p) if sharding else p.numel()
            if sharding and p.requires_grad:  # gathered in the run's precision: pairs of adapters, else fp32, too
                p.data = p.data.to(chunk.config.params_dtype)
            weights += numel * (4 if sharding and p.requires_grad else p.itemsize)
            if p.requires_grad:
                trained[group_of(name)] += p.numel()
                gradients += numel * (p.dtype.itemsize if grad_width and not sharding else 4)
                # Parameters in shards are their own main parameters, and in fp32.
                updated.append(torch.empty(numel, dtype=torch.float32, device="meta") if sharding else p)
    shards = topology.copies if parallel.data_parallel_sharding == "optimizer" else 1
    states, host, optimizer_peak = _optimizer(updated, parallel, device_kind, shards)
    if parallel.offloads_parameters:  # weights are their own main parameters
        buffers = sum(buffer.nbytes for chunk in model for buffer in chunk.buffers() if buffer.dtype != torch.uint8)
        host += weights - buffers + gradients - 4 * sum(p.numel() for p in updated)
        weights, gradients, optimizer_peak = buffers, 0, 0
    activations = peak = 0
    if row is not None:
        ahead = AheadBytes(held=0, peak=0)
        if topology.encodes_ahead:
            whole = make_batch(row, _tokens(config, row), model.config, model.stages[0].config.params_dtype)
            ahead = ahead_bytes(model, [whole] * (config.num_microbatches_per_batch // topology.dp), device_kind)
        bytes_of = [_chunk_bytes(config, model, chunk, row, device_kind, sharding) for chunk in model]
        microbatches = config.num_microbatches_per_batch // topology.dp
        activations, peak = step_peak(bytes_of, passes(microbatches, topology.pp, topology.pp_rank, topology.vp))
        activations, peak = activations + ahead.held, max(peak + ahead.held, ahead.peak, bytes_of_sums(model))
    ranks = topology.grid.group(topology.rank, *STAGE)
    return StageMemory(
        stage=topology.pp_rank,
        ranks=(ranks[0], ranks[-1]),
        parameters=held,
        trainable=trained,
        weights=weights,
        gradients=gradients,
        optimizer=states,
        host=host,
        activations=activations,
        temporary=max(peak, optimizer_peak) - activations,
        constant=_constant(topology) if device_kind == "cuda" else 0,
    )


def _optimizer(
    parameters: Sequence[Tensor], parallel: ParallelConfig, device_kind: Any, shards: int
) -> tuple[int, int, int]:
    """Bytes of the optimizer's state on the device, on the host, and of its update's temporaries on the device."""
    own_width = not parallel.accumulate_allreduce_grads_in_fp32
    states = host = copied = largest = 0
    for p, there in zip(parameters, on_host([p.numel() for p in parameters], parallel.host_share)):
        half = p.dtype.itemsize < 4
        # AdamW's moments, and fp32 main parameters beside 16-bit ones, and beside all that are on another side.
        if there:
            host += 12 * p.numel()
            if device_kind == "cpu":  # where the update's temporaries are torch's
                largest = max(largest, 4 * min(p.numel(), PIECE))
            continue
        states += (12 if half else 8) * p.numel()
        copied += 4 * p.numel() if half and own_width else 0  # the optimizer's own fp32 gradients
        largest = max(largest, 4 * p.numel())
    peak = -(-copied // shards) + largest * (1 if device_kind == "cuda" else 2)
    return -(-states // shards), -(-host // shards), peak


def _sharding(config: RunConfig, topology: Topology, device_kind: Any) -> Sharding | None:
    parallel = config.parallel
    if not parallel.fully_sharded:
        return None
    several = config.num_microbatches_per_batch // topology.dp > 1
    keeps = parallel.data_parallel_sharding == "gradients"
    return Sharding(
        ranks=parallel.sharding_group_size or topology.copies,
        keeps=keeps,
        frees=not (keeps and several),
        adds=several,
        reduced=4 if parallel.accumulate_allreduce_grads_in_fp32 else None,
        host=parallel.offloads_parameters,
        copies=parallel.offloads_parameters and device_kind == "cuda",
    )


def _chunk_bytes(
    config: RunConfig, model: Model, chunk: Any, row: RowShape, device_kind: Any, sharding: Sharding | None
) -> ChunkBytes:
    tokens = _tokens(config, row)
    local = tokens // config.row_multiple

    def batch() -> Row:
        made = own_tokens(
            model.topology, make_batch(row, tokens, model.config, chunk.config.params_dtype), chunk.image_work
        )
        return replace(made, pixels=tuple(made.pixels[i] for i in made.share.mine)) if made.share else made

    received = local, 1, chunk.language_model.input_size
    exact = config.model.attention == "segments"
    if model.topology.encodes_ahead:
        made = encoded(batch(), model)  # outside of what is measured: held over the step
        return measure_chunk(chunk, lambda: made, received, device_kind, exact=exact)
    return measure_chunk(chunk, batch, received, device_kind, sharding, exact)


def _tokens(config: RunConfig, row: RowShape) -> int:
    tokens = max(sum(row.segments), config.row_fill)
    return -(-tokens // config.row_multiple) * config.row_multiple


def make_batch(row: RowShape, tokens: int, model_config: FamilyConfig, dtype: torch.dtype) -> Row:
    """A batch of ``row``, filled to ``tokens``, with a loss on every token; image features come first.

    Raises:
        ConfigError: the images take more tokens than there are.
    """
    segments = [*row.segments, tokens - sum(row.segments)] if tokens > sum(row.segments) else list(row.segments)
    costs = [model_config.image_cost(image) for image in row.images] if has_tower(model_config) else []
    features = sum(cost.features for cost in costs)
    if features > tokens:
        raise ConfigError(
            f"a row of {row} needs {features} tokens for its images: raise data.seq_length, or lower data.image_size, "
            "max_dynamic_patch, max_pixels or hd_num"
        )
    ids = torch.zeros(tokens, dtype=torch.int64)
    ends = accumulate((cost.features for cost in costs), initial=0)
    made = Row.of(
        {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in segments]), "labels": ids},
        segments,
        pixels=tuple(torch.empty(image, dtype=dtype, device="meta") for image in row.images),
        image_positions=torch.arange(features),
    )
    return replace(made, runs=tuple(pairwise(ends)))


def passes(microbatches: int, pp: int, pp_rank: int, vp: int) -> Iterator[tuple[bool, int]]:
    """Yields (forward, chunk) of each pass of a rank in a step, in order.

    Source: megatron-core 0.16.1, pipeline_parallel/schedules.py: one forward, one backward after the warm-up.
    """
    group = pp if vp > 1 else 1
    order = [chunk for _ in range(microbatches // group) for chunk in range(vp) for _ in range(group)]
    behind = pp - pp_rank - 1
    warmup = behind if vp == 1 else len(order) if microbatches == pp else 2 * behind + (vp - 1) * group
    warmup = min(warmup, len(order))
    yield from ((True, chunk) for chunk in order[:warmup])
    for number, chunk in enumerate(order):
        if warmup + number < len(order):
            yield True, order[warmup + number]
        yield False, vp - 1 - chunk


def step_peak(chunks: Sequence[ChunkBytes], order: Iterable[tuple[bool, int]]) -> tuple[int, int]:
    """(most bytes kept between passes, most bytes in use) of a step's passes."""
    now = kept = peak = 0
    for forward, number in order:
        chunk = chunks[number]
        if forward:
            peak = max(peak, now + chunk.forward)
            now += chunk.kept
        else:
            peak = max(peak, now - chunk.kept + chunk.backward)
            now -= chunk.kept
        kept = max(kept, now)
    return kept, peak


def _constant(topology: Topology) -> int:
    groups = sum(topology.grid.size(axis) > 1 for axis in AXES) + (topology.world_size > 1)
    return _CUDA_CONTEXT + groups * _NCCL_GROUP
