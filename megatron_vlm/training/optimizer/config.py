"""The section ``optimizer`` of a run: AdamW, its learning rate schedule and loss scaling.

OptimizerConfig --Schedule.at(step)--> learning rate of llm, vision, connector

The schedule is a pure function of the number of updates done, so a resumed run needs no scheduler state.
"""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError


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
        fused: torch's fused AdamW, which takes / tokens and clipping as a factor, so that neither is a pass over the gradients
            and no step waits for their norm; None: on a GPU, where neither Transformer Engine nor apex brings another AdamW.
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
    fused: bool | None = None

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
