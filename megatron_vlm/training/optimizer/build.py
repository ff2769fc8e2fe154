"""Gradient buffers and AdamW of megatron-core, with one learning rate per part of the model.

    OptimizerConfig --Schedule.at(step)--> learning rate of llm, vision, connector --set_learning_rates--> param groups

The schedule is a pure function of the number of updates done, so a resumed run needs no scheduler state.
"""

import dataclasses
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import AdamOptimizerConfig, ParamKey, ParamPredicate

from megatron_vlm.models.built import Model, unwrapped
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.training import ahead
from megatron_vlm.training.ahead import main_gradients, note_trained, sum_over
from megatron_vlm.training.optimizer.config import OptimizerConfig
from megatron_vlm.training.optimizer.gradients import Gradients
from megatron_vlm.training.optimizer.host import HostOptimizer
from megatron_vlm.training.optimizer.sharded import FullySharded
from megatron_vlm.training.optimizer.update import Mean, fold_update, gradient_norm
from megatron_vlm.weights.mapping import GROUPS, group_of


def wrap_model(model: Model, parallel: ParallelConfig) -> Model:
    """Wraps stages so that gradients are summed over dp ranks: by megatron-core's DistributedDataParallel, or in shards.

    Copies of tower and connector on later stages are left out: what trains of them is ``stage.trained`` (training/ahead.py).
    """
    if parallel.fully_sharded:
        sharded = [FullySharded(stage, parallel, model.topology) for stage in model]
        return dataclasses.replace(model, stages=sharded)
    note_trained(model)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=parallel.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        use_distributed_optimizer=parallel.data_parallel_sharding == "optimizer",
        bucket_size=parallel.ddp_bucket_size,
    )
    stages = [
        Gradients(config=stage.config, ddp_config=dataclasses.replace(ddp), module=stage, disable_bucketing=number > 0)
        for number, stage in enumerate(model)
    ]
    return dataclasses.replace(model, stages=stages)


def connect(model: Model, optimizer: Any, mean: Mean | None) -> None:
    """Tells megatron-core's schedules, through the model's config, how to scale the loss and finish gradients.

    In fp32 the config must not lead to the optimizer: a distributed one's parts of parameters hold the nodes of the graph that
    DDP's hooks are on, a circle through C++ that Python's collector cannot see.
    """
    for stage in model:
        config = stage.config
        config.finalize_model_grads_func = partial(finish_gradients, model, mean)
        config.grad_scale_func = optimizer.scale_loss if optimizer.config.fp16 else None
        if isinstance(stage, FullySharded) or stage.ddp_config.overlap_grad_reduce:
            functions = [other.no_sync for other in model]
            config.no_sync_func = functions if len(functions) > 1 else functions[0]


def finish_gradients(model: Model, left: Mean | None, chunks: Any, num_tokens: Any = None, **rest: Any) -> None:
    """What megatron-core's schedules call at their end: gradients of the step, summed over all ranks that have a part in them,
    / tokens of the global batch, which may be ``left`` to the update.

    megatron-core's own division asks the device whether there are tokens, and waits for the answer.
    """
    stage, topology = unwrapped(model.stages[0]), model.topology
    sharded = isinstance(model.stages[0], FullySharded)
    if sharded:
        for chunk in chunks:
            chunk.finalise()
    else:
        if topology.encodes_ahead:
            ahead.finish(model)
        finalize_model_grads(chunks, None, **rest)
    if topology.pp > 1:
        last = dist.get_process_group_ranks(topology.pp_group)[-1]
        dist.broadcast(num_tokens, last, group=topology.pp_group)
    dist.all_reduce(num_tokens, group=topology.copies_group)
    mean = 1.0 / num_tokens.clamp(min=1)
    if left is not None:
        left.value = mean
    else:
        for chunk in chunks:
            chunk.scale_gradients(mean)
    if not sharded and topology.tp > 1:
        parts = [p for chunk in chunks for p in chunk.parameters() if getattr(p, "part_over_heads", False)]
        sum_over(main_gradients([p for p in parts if p.requires_grad]), topology.tp_group)
    if not sharded and topology.whole_tower and not stage.holds_copies:
        # After the sum over data parallel ranks, which may have begun in the last backward pass: sums commute, and tensor
        # parallel ranks hold the same shards of them.
        sum_over(main_gradients(stage.trained), topology.tp_group)


def build_optimizer(config: OptimizerConfig, model: Model, host_share: float = 0.0) -> Any:
    """Makes megatron-core's optimizer over the trainable parameters of this rank, or ours with its state on the host.

    megatron-core picks Transformer Engine's or apex's fused AdamW where installed, else torch's; all decouple the
    weight decay. A rank with nothing to train gets one that steps without effect and joins every collective.

    Args:
        config: AdamW's settings.
        model: of ``wrap_model``; bf16 and fp16 weights get fp32 main parameters.
        host_share: of ``ParallelConfig``.
    """
    params_dtype = model.options.torch_dtype
    mcore_config = AdamOptimizerConfig(
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        fp16=params_dtype == torch.float16,
        bf16=params_dtype == torch.bfloat16,
        params_dtype=params_dtype,
        loss_scale=config.loss_scale if params_dtype == torch.float16 else None,
        initial_loss_scale=config.initial_loss_scale,
        min_loss_scale=config.min_loss_scale,
        loss_scale_window=config.loss_scale_window,
        hysteresis=config.hysteresis,
        use_distributed_optimizer=model.stages[0].ddp_config.use_distributed_optimizer,
    )
    sharded = isinstance(model.stages[0], FullySharded)
    stages = [stage.for_optimizer() for stage in model] if sharded else list(model)
    named = (pair for stage in stages for pair in stage.named_parameters()) if sharded else model.named_parameters()
    groups = {id(p): group_of(name) for name, p in named}
    overrides: dict[Any, Any] = {
        ParamKey(name="*.bias", predicate=ParamPredicate(name="param_len_1", fn=lambda p: p.dim() == 1)): {
            "wd_mult": 0.0
        }
    }
    for group in GROUPS:
        belongs = ParamPredicate(name=group, fn=lambda p, group=group: groups[id(p)] == group)
        overrides[ParamKey(predicate=belongs)] = {"group": group}
    if host_share:
        optimizer: Any = HostOptimizer(mcore_config, stages, overrides, host_share, model.topology.tp_group)
    else:
        optimizer = get_megatron_optimizer(mcore_config, stages, overrides, use_gloo_process_groups=False)
    for part in optimizer.chained_optimizers if sharded else ():
        part.grad_stats_parallel_group = torch.distributed.group.WORLD  # all ranks hold parts of the gradients
    replicas = model.stages[0].replicas if sharded else 1
    optimizer.get_grad_norm = partial(gradient_norm, optimizer, replicas)
    mean = None if host_share else fold_update(optimizer, config.fused, replicas, model.topology.device)
    connect(model, optimizer, mean)
    return optimizer


def set_learning_rates(optimizer: Any, rates: dict[str, float], weight_decay: float) -> None:
    """Writes the learning rate and weight decay of the next update into the parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["group"]]
        group["weight_decay"] = weight_decay * group["wd_mult"]
