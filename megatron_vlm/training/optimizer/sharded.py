"""Weights, gradients and optimizer state in shards over data parallel ranks: torch's ``fully_shard`` (FSDP2) around a stage.

    a layer's pass --all-gather--> its parameters whole, in the run's dtype --pass--> only this rank's rows again
    its gradients  --reduce-scatter in fp32--> this rank's rows --finalise: tp sum--> main_grad of the optimizer's

Each decoder and tower layer is a unit; embeddings, connector, norms and head are the root's, whole from the start of the
forward pass to the end of the backward pass. A parameter that trains lies in fp32, cut: it is its own main parameter, and the
optimizer (megatron-core's) gets this rank's rows as plain tensors, so that norm, clipping, loss scale, AdamW and checkpoints
see nothing of it.

megatron-core 0.16.1's own wrappers do not serve: TorchFullyShardedDataParallel writes its mesh as "cuda", makes each column
parallel linear a unit (our head's weight is read, never called) and raises TypeError in finish_grad_sync; Megatron-FSDP writes
"cuda" in 50 places, so that nothing of it can be tested without a GPU. Both keep bf16 gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from megatron_vlm.models.built import global_named_parameters
from megatron_vlm.models.vlm import VisionLanguageModel
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.host import host_empty
from megatron_vlm.parallel.shards import held
from megatron_vlm.parallel.topology import Topology
from megatron_vlm.weights.mapping import group_of


class FullySharded(nn.Module):
    """A stage in shards, with what megatron-core's schedule and ours ask of its DDP.

    Attributes:
        module: the stage.
        config: its own.
        ddp_config: megatron-core's defaults, which its optimizer reads.
        trained: (global name, parameter of the stage, this rank's rows of it as the optimizer updates them); ranks without a
            row of it leave it out.
        replicas: groups of ranks with all shards each.
    """

    def __init__(self, stage: VisionLanguageModel, parallel: ParallelConfig, topology: Topology):
        super().__init__()
        self.config, self.topology = stage.config, topology
        self.ddp_config = DistributedDataParallelConfig()
        self.keeps = parallel.data_parallel_sharding == "gradients"
        mesh = _mesh(parallel, topology)
        self.replicas = mesh.size(0) if mesh.ndim > 1 else 1
        dtype = stage.config.params_dtype
        reduced = torch.float32 if parallel.accumulate_allreduce_grads_in_fp32 else dtype
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
        if dtype == torch.float32:
            policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        host = OffloadPolicy()
        if parallel.offloads_parameters:
            host = CPUOffloadPolicy(pin_memory=topology.device.type == "cuda")
        layers = [module for module in stage.modules() if isinstance(module, TransformerLayer)]
        for unit in (*layers, stage):  # the root is kept whole, or it would be gathered again at once
            again = not self.keeps and unit is not stage
            _shard(unit, mesh=mesh, reshard_after_forward=again, mp_policy=policy, offload_policy=host)
        for name in ("logits", "next_logits"):
            register_fsdp_forward_method(stage, name)
        stage.lockstep, decoder = True, set(stage.language_model.modules())
        for layer in layers:
            layer.register_forward_pre_hook(partial(_entering, stage, layer not in decoder))
        self.module = stage
        if parallel.offloads_parameters and topology.device.type == "cpu":
            for unit in self._units():
                _to_host(unit)
        self.trained: list[tuple[str, nn.Parameter, Any]] = [
            (name, parameter, _rows(parameter, parallel.offloads_parameters))
            for name, parameter in global_named_parameters(stage)
            if parameter.requires_grad and held(parameter)[0].numel()
        ]

    def forward(self, *args: Any) -> Tensor:
        return self.module(*args)

    def train(self, mode: bool = True) -> "FullySharded":
        """As of any module; what a pass without gradients left whole is let go of first."""
        for unit in self._units():
            unit.reshard()
        return super().train(mode)

    def zero_grad_buffer(self) -> None:
        """Lets go of all gradients."""
        for _, parameter, rows in self.trained:
            parameter.grad = rows.grad = rows.main_grad = None

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Around all microbatches of a step but the last.

        Parameters that stay whole after a forward pass stay so until the last one's backward pass, and replicas of all shards
        sum theirs once. Gradients are scattered after each: kept whole, they would take what sharding saves.
        """
        self._between(True)
        try:
            yield
        finally:
            self._between(False)

    def _between(self, more: bool) -> None:
        for unit in self._units():
            unit.set_reshard_after_backward(not (more and self.keeps), recurse=False)
            unit.set_requires_all_reduce(not more, recurse=False)

    def _units(self) -> Iterator[FSDPModule]:
        return (module for module in self.modules() if isinstance(module, FSDPModule))

    def finalise(self) -> None:
        """In place of megatron-core's ``finalize_model_grads``: the rest of the sum, into ``main_grad``."""
        summed, whole_tower = [], self.topology.whole_tower
        for name, parameter, rows in self.trained:
            grad = cast(Any, parameter.grad)
            rows.main_grad = torch.zeros_like(rows) if grad is None else grad.to_local()
            if hasattr(rows, "trained_rows"):
                rows.main_grad *= rows.trained_rows
            over_tokens = self.config.sequence_parallel and getattr(parameter, "sequence_parallel", False)
            own_images = whole_tower and group_of(name) != "llm"
            if over_tokens or own_images or getattr(parameter, "part_over_heads", False):
                summed.append(rows.main_grad)
        if summed and self.topology.tp > 1:
            flat = _flatten_dense_tensors(summed).to(self.topology.device)
            dist.all_reduce(flat, group=self.topology.tp_group)
            for grad, whole in zip(summed, _unflatten_dense_tensors(flat, summed)):
                grad.copy_(whole)

    def scale_gradients(self, factor: Tensor) -> None:
        """As of megatron-core's DDP."""
        if self.trained:  # torch refuses an empty list
            grads = [rows.main_grad for _, _, rows in self.trained]
            torch._foreach_mul_(grads, factor.to(grads[0].device))

    def for_optimizer(self) -> Any:
        """What megatron-core's optimizer reads of a model."""
        rows = [(name, rows) for name, _, rows in self.trained]
        return SimpleNamespace(named_parameters=lambda: rows, ddp_config=self.ddp_config, config=self.config)


def _mesh(parallel: ParallelConfig, topology: Topology) -> DeviceMesh:
    if parallel.sharding_group_size is None:
        return DeviceMesh.from_group(topology.copies_group, topology.device.type)
    # Ranks next to one another differ in tp (parallel/grid.py); those of a sharding group follow, so that it lies in a node.
    ranks = torch.arange(topology.world_size).view(-1, parallel.sharding_group_size, topology.tp)
    return DeviceMesh(topology.device.type, ranks, mesh_dim_names=("replicate", "shard", "tp"))["replicate", "shard"]


def _shard(unit: nn.Module, **how: Any) -> None:
    """Cuts what is not in another unit yet; what trains is made fp32 first, so that no more than a unit is whole in fp32.

    A stage in the CPU's memory comes to the device so, unit by unit.
    """
    _cut_nf4(unit)
    before = {name: vars(parameter) for name, parameter in unit.named_parameters()}
    for parameter in unit.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.to(how["mesh"].device_type, torch.float32)
    fully_shard(unit, **how)
    for name, parameter in unit.named_parameters():
        vars(parameter).update(before[name])  # fully_shard makes new parameters, without megatron-core's marks
    for_sums = cast(FSDPModule, unit)
    for_sums.set_gradient_divide_factor(1.0)  # losses are sums over tokens
    for_sums.set_force_sum_reduction_for_comms(True)


def _cut_nf4(unit: nn.Module) -> None:
    """Makes parameters of codes and scales in 4 bits, which are buffers: whole numbers, as ``fully_shard`` casts all others."""
    for linear in unit.modules():
        weight = getattr(linear, "nf4", None)
        for owner, name in ((linear, "weight"), (weight, "absmax")) if weight is not None else ():
            buffer = owner._buffers.pop(name, None)
            if buffer is not None:
                numbers = buffer.view(torch.int32) if buffer.is_floating_point() else buffer
                owner.register_parameter(name, nn.Parameter(numbers, requires_grad=False))


def _entering(stage: VisionLanguageModel, sees_filler: bool, layer: nn.Module, args: Any) -> None:
    """What is to know the parameters of a unit, which are whole inside it and nowhere else."""
    stage.saved.keep(layer.parameters())
    if sees_filler:
        stage.filler.guard(layer.parameters())


def _to_host(unit: FSDPModule) -> None:
    """On the CPU, which is device and host in one: shards into the memory that stands for the host's (parallel/host.py).

    On a GPU FSDP2 has copied them to the host, page-locked, and copies gradients there.
    """
    group = unit._get_fsdp_state()._fsdp_param_group
    for held_by in group.fsdp_params if group is not None else ():
        flat, parameter = held_by._sharded_param_data, cast(Any, held_by.sharded_param)
        mine, host = parameter._local_tensor, host_empty(flat.shape, flat.dtype, flat.device).copy_(flat)
        flat.set_(host.untyped_storage(), 0, flat.shape, flat.stride())
        mine.set_(host.untyped_storage(), 0, mine.shape, mine.stride())
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                partial(_gradient_to_host, host_empty(mine.shape, mine.dtype, mine.device))
            )


def _gradient_to_host(host: Tensor, parameter: Any) -> None:
    if parameter.grad._local_tensor.data_ptr() != host.data_ptr():  # else it was added to what is there
        parameter.grad._local_tensor = host.copy_(parameter.grad._local_tensor)


def _rows(parameter: nn.Parameter, on_host: bool) -> nn.Parameter:
    """This rank's rows as a parameter of their own, of the same memory, with the marks that megatron-core reads.

    ``on_host``: that memory is the host's.
    """
    mine, start = held(parameter)
    rows = nn.Parameter(mine)
    vars(rows).update(vars(parameter))
    rows.shard_of, rows.on_host = (parameter, start), on_host  # type: ignore[attr-defined]
    if hasattr(rows, "trained_rows"):
        rows.trained_rows = rows.trained_rows[start : start + len(mine)].to(mine.device)
    return rows
