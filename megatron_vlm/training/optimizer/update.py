"""An update without a pass of its own for / tokens and clipping, and without a wait for the device.

    sums of gradients --norm, a tensor--> 1 / tokens * min(1, clip / norm) --grad_scale of torch's fused AdamW--> weights

Bytes a parameter: norm 4, AdamW 32 (the kernel writes the scaled gradient back), weights in bf16 6; no pass zeroes the gradients
(gradients.py). megatron-core reads the norm on the host, and takes 8 for / tokens, 16 for clipping and 4 for zeros.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlm.errors import ConfigError


@dataclass
class Mean:
    """1 / tokens of the step, fp32, which ``finish_gradients`` leaves to the update."""

    value: Tensor | None = None


def fold_update(optimizer: Any, fused: bool | None, replicas: int, device: torch.device) -> Mean | None:
    """Has megatron-core's optimizer update by torch's fused AdamW, with 1 / tokens and clipping folded in; None: it is as ever.

    Args:
        optimizer: as ``get_megatron_optimizer`` returns it.
        fused: of ``OptimizerConfig``.
        replicas: as of ``gradient_norm``.
        device: of the model.

    Raises:
        ConfigError: ``fused`` is asked for, and the optimizer has another AdamW.
    """
    inner = [part.optimizer for part in optimizer.chained_optimizers if not part.is_stub_optimizer]
    others = [type(adam) for adam in inner if not isinstance(adam, torch.optim.Adam | torch.optim.AdamW)]
    if fused and others:
        raise ConfigError(
            f"optimizer.fused is torch's AdamW, and megatron-core took {others[0].__module__}.{others[0].__qualname__}, which is "
            "installed: leave optimizer.fused out"
        )
    if others or not (device.type == "cuda" if fused is None else fused):
        return None
    for adam in inner:
        for group in adam.param_groups:
            group["fused"] = True
    mean = Mean()
    optimizer.step = partial(_step, optimizer, replicas, mean)
    return mean


@torch.no_grad()
def _step(optimizer: Any, replicas: int, mean: Mean) -> tuple[bool, Tensor | None, None]:
    """(whether there was an update, norm of the gradients before clipping, None); as megatron-core's, the norm still a tensor."""
    if optimizer.prepare_grads():
        return False, None, None
    assert mean.value is not None
    factor = mean.value
    norm = (squared_norm(optimizer) / replicas).sqrt() * factor
    if optimizer.config.clip_grad > 0:
        factor = factor * (optimizer.config.clip_grad / (norm + 1.0e-6)).clamp(max=1.0)
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            part.optimizer.grad_scale = factor.reciprocal()
    return optimizer.step_with_ready_grads(), norm, None


def gradient_norm(optimizer: Any, replicas: int = 1) -> float:
    """Norm of all gradients of the model, each counted once; in place of megatron-core's, a collective of the same ranks.

    ``replicas``: how often those ranks hold each gradient.
    """
    return float((squared_norm(optimizer).item() / replicas) ** 0.5)


def squared_norm(optimizer: Any) -> Tensor:
    """fp32 scalar over the ranks that hold gradients of the model.

    Without apex and Transformer Engine, megatron-core 0.16.1 asks the GPU for the norm of each parameter in turn: 279 waits, a
    tenth of the step of a model of 1.2B.
    """
    grads = [grad for part in optimizer.chained_optimizers for grad in part.get_main_grads_for_grad_norm()]
    if grads:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, torch.float32)))
        square = norm.to(torch.cuda.current_device()) ** 2  # of gradients on the host, too
    else:
        square = torch.zeros((), device=torch.cuda.current_device())
    dist.all_reduce(square, group=optimizer.get_grad_stats_parallel_group())
    return square
