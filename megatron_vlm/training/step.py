"""One optimizer step over this rank's microbatches.

    rows --device_batch--> forward_step --(megatron-core schedule, loss SUM, token COUNT)--> gradients
         --finish_gradients: dp sum, / tokens of the global batch--> optimizer.step: norm, clipping, AdamW

Loss and gradients are sums over the global batch divided by its supervised tokens, so they do not depend on the layout
or on how samples were packed into rows.
"""

import math
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlm.data.row import Row
from megatron_vlm.errors import TrainingError
from megatron_vlm.models.built import Model, unwrapped
from megatron_vlm.models.family_config import FamilyConfig
from megatron_vlm.parallel.batch import device_batch
from megatron_vlm.parallel.host import fetch, send
from megatron_vlm.parallel.topology import Topology
from megatron_vlm.training.ahead import encode_ahead
from megatron_vlm.training.memory.flops import forward_flops

_COUNTS = ("tokens", "supervised_tokens", "images", "samples", "holes", "truncated")
_FLOPS = ("vision", "connector", "llm")


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did, equal on every rank.

    Attributes:
        loss: mean token loss of the global batch before the update; 0 where nothing is supervised.
        grad_norm: norm of all gradients before clipping; 0 on a skipped step.
        skipped: gradients overflowed in fp16 and no weight was changed.
        loss_scale: of this step; 1 without fp16.
        tokens: real tokens; filler does not count.
        supervised_tokens, images, samples, holes, truncated: sums over the global batch.
        memory_gib: largest over the ranks: peak allocated on a GPU, peak resident on the CPU.
        forward_flops: operations of a forward pass over the global batch, of tower, connector and decoder.
    """

    loss: float
    grad_norm: float
    skipped: bool
    loss_scale: float
    tokens: int
    supervised_tokens: int
    images: int
    samples: int
    holes: int
    truncated: int
    memory_gib: float
    forward_flops: tuple[float, ...] = (0.0, 0.0, 0.0)


class Cursor:
    """Hands out the rows of a step to one model chunk and remembers the one in work, for errors."""

    def __init__(self, rows: Sequence[Row]):
        self.rows, self.position = rows, 0

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        row = self.rows[self.position]
        self.position += 1
        return row

    @property
    def current(self) -> Row:
        return self.rows[max(0, self.position - 1)]


class RunningStep:
    """A step that the device may still be at work on. What the host knows at once, and what ``result`` waits for.

    Attributes:
        skipped: gradients overflowed in fp16 and no weight was changed.
    """

    def __init__(self, skipped: bool, values: Tensor, rows: Sequence[Row]):
        self.skipped, self.rows = skipped, rows
        self._values, self._arrived = fetch(values)

    @property
    def arrived(self) -> bool:
        """``result`` has nothing to wait for."""
        return self._arrived is None or self._arrived.query()

    def result(self) -> StepResult:
        """Waits for the step.

        Raises:
            TrainingError: on every rank: loss or norm is not finite.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        loss_sum, *counts = self._values.tolist()
        flops, (norm, loss_scale, memory) = counts[len(_COUNTS) : -3], counts[-3:]
        numbers = {name: int(number) for name, number in zip(_COUNTS, counts)}
        loss = loss_sum / numbers["supervised_tokens"] if numbers["supervised_tokens"] else 0.0
        if not self.skipped and not (math.isfinite(loss) and math.isfinite(norm)):
            keys = [key for row in self.rows for key in row.keys]
            raise TrainingError(
                f"loss {loss} or gradient norm {norm} is not finite; this rank's samples: {', '.join(keys[:20])}"
                f"{' ...' if len(keys) > 20 else ''}. No checkpoint of this state is written. Lower optimizer.lr, raise "
                "the warm-up, or look at these samples"
            )
        return StepResult(
            loss=loss,
            grad_norm=norm,
            skipped=self.skipped,
            loss_scale=loss_scale,
            memory_gib=memory,
            **numbers,
            forward_flops=tuple(flops),
        )


def train_step(model: Model, optimizer: Any, rows: Sequence[Row]) -> StepResult:
    """``start_step``, and its result."""
    return start_step(model, optimizer, rows).result()


def start_step(model: Model, optimizer: Any, rows: Sequence[Row]) -> RunningStep:
    """Runs forward, backward and the update for one global batch, without a wait for the device where nothing asks for one:
    fp16, whose overflow decides whether there is an update, and AdamW that is not ``optimizer.fused``, do.

    Args:
        model: of ``wrap_model``.
        optimizer: of ``build_optimizer``, learning rates set.
        rows: this replica's microbatches, the same number on every data parallel rank, as ``share_rows`` gives them.

    Raises:
        TrainingError: out of memory (on the rank it happened on).
    """
    topology = model.topology
    for stage in model:
        stage.zero_grad_buffer()
    optimizer.zero_grad()
    loss_scale = optimizer.get_loss_scale() if optimizer.config.fp16 else 1.0
    losses = run_schedule(model, rows, forward_only=False)
    updated, grad_norm, _ = optimizer.step()
    sums = sum_over_job(losses, rows, topology, model.config)
    memory = send([peak_memory_gib(topology.device)], torch.float64, topology.device)
    dist.all_reduce(memory, dist.ReduceOp.MAX)
    more = [grad_norm if isinstance(grad_norm, Tensor) else float(grad_norm or 0.0), loss_scale]
    values = [x.double().reshape(1) if isinstance(x, Tensor) else sums.new_full((1,), x) for x in more]
    return RunningStep(not updated, torch.cat([sums, *values, memory]), rows)


def run_schedule(model: Model, rows: Sequence[Row], *, forward_only: bool) -> list[dict[str, Tensor]]:
    """Runs megatron-core's schedule over the rows; the last stage returns the loss sum of each, others an empty list.

    Raises:
        TrainingError: out of memory, with the row that was in work and what to lower.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    cursors, stages = [Cursor(rows) for _ in model], list(model)
    no_grad: AbstractContextManager = torch.no_grad() if forward_only else nullcontext()
    try:
        with no_grad:
            if model.topology.encodes_ahead:
                rows = encode_ahead(model, rows)
                cursors = [Cursor(rows) for _ in model]
            return get_forward_backward_func()(
                forward_step_func=partial(forward_step, model.topology),
                data_iterator=cursors if len(cursors) > 1 else cursors[0],
                model=stages if len(stages) > 1 else stages[0],
                num_microbatches=len(rows),
                seq_length=len(rows[0].input_ids),  # read with virtual stages only, where all rows are of this length
                micro_batch_size=1,
                forward_only=forward_only,
            )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        current = max(cursors, key=lambda cursor: cursor.position).current
        raise TrainingError(out_of_memory_message(model.topology, current, error)) from error


def forward_step(topology: Topology, rows: Iterator[Row], chunk: Any) -> tuple[Tensor, Callable]:
    """One microbatch of one stage, as megatron-core's schedules call it."""
    row, stage = next(rows), unwrapped(chunk)
    dtype, work = stage.config.params_dtype, stage.image_work
    batch = device_batch(topology, row, pixels=stage.pre_process, dtype=dtype, work=work)
    return chunk(batch), partial(_loss, batch)


def _loss(row: Row, loss_sum: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The one place of the loss formula: the sum of token losses goes backward, and with ``calculate_per_token_loss``
    megatron-core divides the summed gradients by the number of supervised tokens of the global batch.

    ``row`` is what the device has of it: under context parallelism this rank's tokens, counts and gradients being summed over
    dp x cp."""
    count = torch.full((), row.num_supervised, dtype=torch.int, device=loss_sum.device)
    return loss_sum, count, {"loss_sum": loss_sum.detach()}


def reduce_over_job(
    losses: list[dict[str, Tensor]], rows: Sequence[Row], topology: Topology, model_config: FamilyConfig
) -> dict[str, float]:
    """Sums loss, counts and operations over the global batch; every rank gets the result. A collective of the whole job.

    Each row is counted once: by tensor and context parallel rank 0 of the last stage. Its loss is the sum of what all context
    parallel ranks there know.
    """
    values = sum_over_job(losses, rows, topology, model_config)
    return dict(zip(("loss_sum", *_COUNTS, *_FLOPS), values.tolist()))


def sum_over_job(
    losses: list[dict[str, Tensor]], rows: Sequence[Row], topology: Topology, model_config: FamilyConfig
) -> Tensor:
    """The same as numbers on the device, float64, without a wait for it."""
    sums = [0.0] * (1 + len(_COUNTS) + len(_FLOPS))
    if topology.last_stage and topology.tp_rank == topology.cp_rank == 0:
        for row in rows:
            counts = (row.num_tokens, row.num_supervised, len(row.pixels), len(row.keys), row.holes, row.truncated)
            images = [(p.shape[0], p.shape[1], p.shape[2]) for p in row.pixels]
            segments = row.segments[:-1] if row.num_filler else row.segments
            flops = forward_flops(model_config, images=images, segments=segments, supervised=row.num_supervised)
            numbers = [0.0, *counts, *(getattr(flops, name) for name in _FLOPS)]
            sums = [a + b for a, b in zip(sums, numbers)]
    values = send(sums, torch.float64, topology.device)
    if topology.last_stage and topology.tp_rank == 0:
        values[0] = torch.stack([loss["loss_sum"].double() for loss in losses]).sum()
    dist.all_reduce(values)
    return values


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on its GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def is_out_of_memory(error: BaseException) -> bool:
    """True for the allocator's errors of either device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def out_of_memory_message(topology: Topology, row: Row, error: BaseException) -> str:
    """Says where memory ran out, over what, and which settings to lower in which order."""
    shapes = [tuple(p.shape[-2:]) for p in row.pixels]
    largest = max(shapes, key=lambda shape: shape[0] * shape[1], default=(0, 0))
    keys = ", ".join(row.keys[:20]) + (" ..." if len(row.keys) > 20 else "")
    return (
        f"out of memory on rank {topology.rank} (tp {topology.tp_rank}, stage {topology.pp_rank}, dp "
        f"{topology.dp_rank}): row of {row.num_tokens} tokens ({len(row.input_ids)} with filler) and "
        f"{len(row.pixels)} images, the largest "
        f"{largest[0]} x {largest[1]} pixels; samples: {keys or 'none'}; peak memory "
        f"{peak_memory_gib(topology.device):.2f} GiB. Lower, in this order: training.micro_batch_size (packing off) or "
        "data.seq_length; data.max_image_num and data.image_size or max_pixels; then set parallel.recompute_granularity=full, "
        "parallel.offload_activations=true, parallel.offload=optimizer, "
        "parallel.data_parallel_sharding=optimizer, or parameters, with more data parallel ranks, "
        "parallel.sequence_parallel=true, or raise parallel.tensor_model_parallel_size. The allocator said: "
        f"{str(error).splitlines()[0]}"
    )
