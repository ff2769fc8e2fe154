"""Gradient buffers and AdamW of megatron-core, with one learning rate per part of the model.

    OptimizerConfig --Schedule.at(step)--> learning rate of llm, vision, connector --set_learning_rates--> param groups

The schedule is a pure function of the number of updates done, so a resumed run needs no scheduler state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.parallel.topology import ParallelConfig

GROUPS = ("llm", "vision", "connector")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """AdamW, its learning rate schedule and loss scaling.

    Attributes:
        lr: highest learning rate.
        min_lr: lowest learning rate of the decay.
        vision_lr, connector_lr: highest learning rate of the vision tower and of the connector; None: ``lr``. Their
            curve has the shape of ``lr``'s.
        lr_decay_style: curve after the warm-up.
        lr_decay_iters: updates until ``min_lr`` is reached; None: the length of the run.
        lr_warmup_iters: updates of warm-up.
        lr_warmup_style: ``linear``, or ``log`` as DeepSpeed's schedulers warm up: by log(1 + updates) / log(lr_warmup_iters).
        lr_warmup_fraction: the same as a fraction of the decay length, rounded up as transformers does; excludes
            ``lr_warmup_iters``.
        lr_warmup_init: learning rate that the warm-up starts from.
        lr_warmup_start_factor: the same as a fraction of ``lr``; excludes ``lr_warmup_init``.
        weight_decay: decoupled; not applied to biases and one-dimensional parameters (norm weights), as in Megatron.
        adam_beta1, adam_beta2, adam_eps: of AdamW.
        clip_grad: largest norm of all gradients together; 0: no clipping.
        loss_scale: fixed loss scale for fp16; None: dynamic.
        initial_loss_scale, min_loss_scale: start and floor of the dynamic scale.
        loss_scale_window: updates without overflow after which the scale doubles.
        hysteresis: overflows in a row before the scale halves.
    """

    lr: float = 1e-4
    min_lr: float = 0.0
    vision_lr: float | None = None
    connector_lr: float | None = None
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    lr_decay_iters: int | None = None
    lr_warmup_iters: int = 0
    lr_warmup_style: Literal["linear", "log"] = "linear"
    lr_warmup_fraction: float | None = None
    lr_warmup_init: float = 0.0
    lr_warmup_start_factor: float | None = None
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    loss_scale: float | None = None
    initial_loss_scale: float = 2.0**32
    min_loss_scale: float = 1.0
    loss_scale_window: int = 1000
    hysteresis: int = 2

    def __post_init__(self) -> None:
        for name in ("lr", "vision_lr", "connector_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(
                    f"optimizer.{name} must be above 0, got {value}: to train a part not at all, freeze it"
                )
        if not 0 <= self.min_lr <= self.lr:
            raise ConfigError(f"optimizer.min_lr {self.min_lr} must lie between 0 and lr {self.lr}")
        if self.lr_warmup_fraction is not None and self.lr_warmup_iters:
            raise ConfigError("set optimizer.lr_warmup_iters or lr_warmup_fraction, not both")
        if self.lr_warmup_fraction is not None and not 0 <= self.lr_warmup_fraction < 1:
            raise ConfigError(f"optimizer.lr_warmup_fraction must lie in [0, 1), got {self.lr_warmup_fraction}")
        if self.lr_warmup_start_factor is not None and self.lr_warmup_init:
            raise ConfigError("set optimizer.lr_warmup_init or lr_warmup_start_factor, not both")
        if not 0 <= self.warmup_start <= self.lr:
            raise ConfigError(f"the warm-up must start between 0 and lr {self.lr}, got {self.warmup_start}")
        for name in ("weight_decay", "clip_grad", "lr_warmup_iters"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optimizer.{name} must not be negative, got {getattr(self, name)}")
        if not (0 <= self.adam_beta1 < 1 and 0 <= self.adam_beta2 < 1 and self.adam_eps > 0):
            raise ConfigError(
                f"AdamW needs betas in [0, 1) and eps above 0, got {self.adam_beta1}, {self.adam_beta2}, "
                f"{self.adam_eps}"
            )

    @property
    def warmup_start(self) -> float:
        """Learning rate of the first update under a warm-up."""
        return self.lr_warmup_init if self.lr_warmup_start_factor is None else self.lr_warmup_start_factor * self.lr


@dataclass(frozen=True)
class Schedule:
    """Learning rates by number of updates done. ``decay_iters``: updates until the floor is reached."""

    config: OptimizerConfig
    decay_iters: int

    @classmethod
    def of(cls, config: OptimizerConfig, num_iterations: int) -> "Schedule":
        """Makes the schedule of a run of ``num_iterations`` updates.

        Raises:
            ConfigError: the warm-up is longer than the decay.
        """
        schedule = cls(config, config.lr_decay_iters or max(1, num_iterations))
        # A fraction below 1 may come out as the whole of a run of a few updates, as in transformers.
        if config.lr_warmup_iters >= schedule.decay_iters and config.lr_decay_style != "constant":
            raise ConfigError(
                f"a warm-up of {config.lr_warmup_iters} iterations leaves none of {schedule.decay_iters} to decay in: "
                "lower optimizer.lr_warmup_iters, or raise the length of the run or optimizer.lr_decay_iters"
            )
        return schedule

    @property
    def warmup_iters(self) -> int:
        """Updates of warm-up. Source of the rounding: transformers, ``TrainingArguments.get_warmup_steps``."""
        fraction = self.config.lr_warmup_fraction
        return self.config.lr_warmup_iters if fraction is None else math.ceil(self.decay_iters * fraction)

    def lr(self, step: int) -> float:
        """Learning rate of the update after ``step`` updates.

        Source: megatron-core 0.16.1, optimizer_param_scheduler.py, ``get_lr``, with steps in updates.
        """
        config, warmup = self.config, self.warmup_iters
        if warmup and step <= warmup:
            if config.lr_warmup_style == "log":  # of deepspeed/runtime/lr_schedules.py, which has two updates at least
                share = math.log(step + 1) / math.log(max(2, warmup))
            else:
                share = step / warmup
            return config.warmup_start + (config.lr - config.warmup_start) * min(1.0, share)
        if config.lr_decay_style == "constant":
            return config.lr
        if step > self.decay_iters:
            return config.min_lr
        ratio = (step - warmup) / (self.decay_iters - warmup)
        share = 1 - ratio if config.lr_decay_style == "linear" else 0.5 * (math.cos(math.pi * ratio) + 1)
        return config.min_lr + share * (config.lr - config.min_lr)

    def at(self, step: int) -> dict[str, float]:
        """Learning rate of each group for the update after ``step`` updates."""
        config, lr = self.config, self.lr(step)
        tops = {"llm": config.lr, "vision": config.vision_lr, "connector": config.connector_lr}
        return {group: lr * ((top or config.lr) / config.lr) for group, top in tops.items()}


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

    from megatron_vlm.models.vlm import global_named_parameters, group_of

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
