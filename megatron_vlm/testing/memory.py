"""Memory in use: the peak of tensors over real training steps, to hold the estimate of training/memory/estimate.py against.

Case --measured: real model of random weights, optimizer, two steps on each rank--> peak of each stage
"""

import gc
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vlm import registry
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.row import Row
from megatron_vlm.models.built import build_model, global_parameters
from megatron_vlm.models.family_config import FamilyConfig
from megatron_vlm.models.options import ModelConfig
from megatron_vlm.parallel import cpu
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.rng import seed_step
from megatron_vlm.parallel.shards import held
from megatron_vlm.parallel.topology import build_topology, destroy_topology, init_process_group
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.training.checkpoint.config import CheckpointConfig
from megatron_vlm.training.memory.estimate import adapt, estimate, make_batch
from megatron_vlm.training.memory.stages import RowShape
from megatron_vlm.training.optimizer.build import build_optimizer, set_learning_rates, wrap_model
from megatron_vlm.training.optimizer.config import OptimizerConfig
from megatron_vlm.training.run_config import RunConfig, TrainingConfig
from megatron_vlm.training.step import train_step
from megatron_vlm.weights.mapping import GROUPS, TensorInfo


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run to measure.

    Attributes:
        name: of the way of training.
        family, model_config: the model.
        row: a microbatch.
        parallel, model, peft: settings of these sections.
        world: ranks.
        microbatches: of a step, over all replicas.
        precision: of the run.
        alone: one rank whose collectives do nothing stands for all: gloo's own copies are left out.
    """

    name: str
    family: str
    model_config: FamilyConfig
    row: RowShape
    parallel: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    peft: dict[str, Any] = field(default_factory=dict)
    world: int = 1
    microbatches: int = 1
    precision: Literal["fp32", "bf16"] = "bf16"
    alone: bool = False

    def config(self) -> RunConfig:
        """The run."""
        return RunConfig(
            data=DataConfig(seq_length=sum(self.row.segments), packing=True),
            model=ModelConfig(**self.model),
            peft=PeftConfig(**self.peft),
            parallel=ParallelConfig(**self.parallel),
            training=TrainingConfig(dry_run=True, precision=self.precision, global_batch_size=self.microbatches),
            checkpoint=CheckpointConfig(load="-"),
        )


def estimated(case: Case, device_kind: Any) -> list[int]:
    """Bytes of tensors of each stage, by the estimate; in a process without a process group."""
    spec = registry.get(case.family)
    stages = estimate(case.config(), spec, case.model_config, case.world, device_kind, row=case.row)
    return [stage.allocated for stage in stages]


def measured(case: Case, device_type: str) -> dict[int, int]:
    """Stage -> largest peak of its ranks."""
    if device_type == "cuda":
        torch.cuda.set_device(0)
        init_process_group(torch.device("cuda", 0))
        found = [measure(case, device_type)]
    elif case.alone:
        cpu.install()
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=case.world)
        try:
            found = [measure(case, device_type)]
        finally:
            torch.distributed.destroy_process_group()
    else:
        found = run_distributed(measure, case, device_type, dp=case.world, timeout=600)
    return {stage: max(peak for number, peak in found if number == stage) for stage, _ in found}


def measure(case: Case, device_type: str) -> tuple[int, int]:
    """On a rank: (number of its stage, peak bytes of tensors) over two steps."""
    config, model_config, device = case.config(), case.model_config, torch.device(device_type)
    row = make_row(case.row, model_config)  # of the host
    peak = PeakOnCpu() if device.type == "cpu" else PeakOnGpu()
    with ExitStack() as stack:
        if not config.parallel.fully_sharded:
            stack.enter_context(peak)
        topology = build_topology(config.parallel, num_layers=model_config.text.num_layers, device=device)
        seed_step(topology, 0, 0)
        options = config.model_options
        model = build_model(registry.get(case.family), model_config, topology, options)
        for stage in model:
            for parameter in stage.parameters():
                torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
        del parameter  # or it would lie here whole beside its shards
        if config.peft.active:  # on one rank: its tensors are the whole ones
            infos = {name: TensorInfo.of(parameter) for name, parameter in global_parameters(model).items()}
            model = adapt(config, model, infos)
        model = wrap_model(model, config.parallel)
        before = 0
        if config.parallel.fully_sharded:  # built where nothing is held before it is cut
            if not config.parallel.offloads_parameters:
                before = sum(held(p)[0].nbytes for stage in model for p in stage.parameters())
            before += sum(buffer.nbytes for stage in model for buffer in stage.buffers())
            stack.enter_context(peak)
        optimizer = build_optimizer(OptimizerConfig(lr=1e-5), model, config.parallel.host_share)
        rows = [row] * (config.num_microbatches_per_batch // topology.dp)
        for step in range(2):
            seed_step(topology, 0, step)
            set_learning_rates(optimizer, dict.fromkeys(GROUPS, 1e-5), 0.01)
            train_step(model, optimizer, rows)
    number = topology.pp_rank
    del model, stage, optimizer
    destroy_topology()
    gc.collect()
    return number, before + peak.bytes


def make_row(row: RowShape, model_config: FamilyConfig) -> Row:
    """A row of that shape with a loss on every token."""
    made = make_batch(row, sum(row.segments), model_config, torch.float32)
    return replace(made, pixels=tuple(torch.randn(image) for image in row.images), keys=("row",))


class PeakOnCpu:
    """Peak of all that torch's CPU allocator hands out, temporaries inside operations included.

    What another thread frees is not seen (gloo's may hold a tensor the longest): told by its address being handed out again,
    so a little is counted too long.
    """

    def __enter__(self) -> "PeakOnCpu":
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profiler.__exit__(*error)
        inner: Any = self.profiler.profiler
        found, events = [], list(inner.kineto_results.experimental_event_tree())
        while events:
            event = events.pop()
            events += event.children
            if event.name == "[memory]":
                found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
        now = self.bytes = 0
        alive: dict[int, int] = {}
        for _, address, size in sorted(found, key=lambda event: event[0]):
            now -= alive.pop(address, 0)
            if size > 0:
                now, alive[address] = now + size, size
                self.bytes = max(self.bytes, now)


class PeakOnGpu:
    """Peak of torch's CUDA allocator."""

    def __enter__(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def __exit__(self, *error: Any) -> None:
        self.bytes = torch.cuda.max_memory_allocated() - self.before
