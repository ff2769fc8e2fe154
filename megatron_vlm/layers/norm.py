"""Normalisations with the constructor that megatron-core's layer specs call, usable with and without sequence parallelism.

megatron-core's own WrappedTorchNorm refuses sequence parallelism; here the weights carry the ``sequence_parallel`` mark
that ``finalize_model_grads`` looks for, so that their gradients are summed over the tensor parallel group. Its own mark for
norms of heads, ``qk_layernorm``, goes by names: it would sum the weights of towers too, which are cut over the ranks.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467).

    With ``config.layernorm_zero_centered_gamma`` times 1 + weight, in fp32 up to the result (Gemma).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any):
        super().__init__()
        self.eps, self.zero_centered = eps, config.layernorm_zero_centered_gamma
        self.weight = make_parameter(torch.ones(hidden_size, dtype=config.params_dtype), config)

    def forward(self, x: Tensor) -> Tensor:
        if self.zero_centered:
            return F.rms_norm(x.float(), (x.shape[-1],), 1 + self.weight.float(), self.eps).to(x.dtype)
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class HeadRMSNorm(RMSNorm):
    """RMSNorm of each head of queries or keys, [..., heads, D], by one weight for all heads (Qwen3).

    A tensor parallel rank has heads of its own, and so a part of the weight's gradient, which ``part_over_heads`` marks: the
    parts are summed once a step, under sequence parallelism or not.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any):
        super().__init__(config, hidden_size, eps)
        setattr(self.weight, "sequence_parallel", False)  # noqa: B010 - or they would be summed twice
        setattr(self.weight, "part_over_heads", True)  # noqa: B010


class NormedResidual(RMSNorm):
    """residual + norm(update), in the place of megatron-core's bias-dropout-add: the second norm of Gemma's sandwich."""

    def forward(  # type: ignore[override]
        self, training: bool, fused: bool
    ) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """Returns the function that megatron-core's layer calls with (output, no bias), residual and dropout."""
        return lambda update, residual, dropout: residual + RMSNorm.forward(self, update[0])


class LayerNorm(nn.Module):
    """LayerNorm with weight and bias over the last dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any):
        super().__init__()
        self.eps = eps
        self.weight = make_parameter(torch.ones(hidden_size, dtype=config.params_dtype), config)
        self.bias = make_parameter(torch.zeros(hidden_size, dtype=config.params_dtype), config)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


def make_parameter(data: Tensor, config: TransformerConfig) -> nn.Parameter:
    """Returns ``data`` as a replicated parameter on the device that ``config`` builds on, marked for sequence parallelism."""
    device = data.device if config.use_cpu_initialization else torch.cuda.current_device()
    parameter = nn.Parameter(data.to(device))
    setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - an attribute megatron-core reads
    return parameter
