"""Gradient buffers and AdamW of megatron-core, with one learning rate per part of the model.

    OptimizerConfig --Schedule.at(step)--> learning rate of llm, vision, connector --set_learning_rates--> param groups

The schedule is a pure function of the number of updates done, so a resumed run needs no scheduler state.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from megatron_vlm.parallel.topology import ParallelConfig
from megatron_vlm.training.optimizer.config import OptimizerConfig

GROUPS = ("llm", "vision", "connector")


def wrap_model(chunks: Sequence[Any], parallel: ParallelConfig) -> list[Any]:
    """Wraps stages into megatron-core's DistributedDataParallel: gradients in buffers reduced over dp ranks."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    return [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=parallel.accumulate_allreduce_grads_in_fp32,
                overlap_grad_reduce=parallel.overlap_grad_reduce,
                use_distributed_optimizer=parallel.use_distributed_optimizer,
                bucket_size=parallel.ddp_bucket_size,
            ),
            module=chunk,
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(chunks)
    ]


def connect(chunks: Sequence[Any], optimizer: Any) -> None:
    """Tells megatron-core's schedules, through the model's config, how to scale the loss and finish gradients."""
    from megatron.core.distributed import finalize_model_grads

    for chunk in chunks:
        config = chunk.config
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = optimizer.scale_loss if optimizer.config.fp16 else None
        if chunk.ddp_config.overlap_grad_reduce:
            functions = [other.no_sync for other in chunks]
            config.no_sync_func = functions if len(functions) > 1 else functions[0]


def build_optimizer(
    config: OptimizerConfig,
    chunks: Sequence[Any],
    *,
    params_dtype: torch.dtype = torch.float32,
) -> Any:
    """Makes megatron-core's optimizer over the trainable parameters of this rank.

    megatron-core picks Transformer Engine's or apex's fused AdamW where installed, else torch's; all decouple the
    weight decay. A rank with nothing to train gets one that steps without effect and joins every collective.

    Args:
        config: AdamW's settings.
        chunks: this rank's model chunks, wrapped by megatron-core's DistributedDataParallel.
        params_dtype: of the weights; bf16 and fp16 get fp32 main parameters.
    """
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import AdamOptimizerConfig, ParamKey, ParamPredicate

    from megatron_vlm.models.options import group_of
    from megatron_vlm.models.vlm import global_named_parameters

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
        use_distributed_optimizer=chunks[0].ddp_config.use_distributed_optimizer,
    )
    groups = {id(p): group_of(name) for chunk in chunks for name, p in global_named_parameters(chunk)}
    overrides: dict[Any, Any] = {
        ParamKey(name="*.bias", predicate=ParamPredicate(name="param_len_1", fn=lambda p: p.dim() == 1)): {
            "wd_mult": 0.0
        }
    }
    for group in GROUPS:
        belongs = ParamPredicate(name=group, fn=lambda p, group=group: groups[id(p)] == group)
        overrides[ParamKey(predicate=belongs)] = {"group": group}
    optimizer = get_megatron_optimizer(mcore_config, list(chunks), overrides, use_gloo_process_groups=False)
    optimizer.get_grad_norm = partial(gradient_norm, optimizer)
    for group in optimizer.param_groups:
        # torch's AdamW, where neither apex nor Transformer Engine is installed: one kernel instead of a dozen.
        if group["params"] and group["params"][0].is_cuda:
            group["fused"] = True
    connect(chunks, optimizer)
    return optimizer


def gradient_norm(optimizer: Any) -> float:
    """Norm of all gradients of the model, each counted once; in place of megatron-core's, a collective of the same ranks.

    Without apex and Transformer Engine, megatron-core 0.16.1 asks the GPU for the norm of each parameter in turn: 279 waits, a
    tenth of the step of a model of 1.2B.
    """
    grads = [grad for part in optimizer.chained_optimizers for grad in part.get_main_grads_for_grad_norm()]
    if grads:
        square = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) ** 2
    else:
        square = torch.zeros((), device=torch.cuda.current_device())
    torch.distributed.all_reduce(square, group=optimizer.get_grad_stats_parallel_group())
    return square.item() ** 0.5


def set_learning_rates(optimizer: Any, rates: dict[str, float], weight_decay: float) -> None:
    """Writes the learning rate and weight decay of the next update into the parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["group"]]
        group["weight_decay"] = weight_decay * group["wd_mult"]
