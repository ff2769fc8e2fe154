"""Projectors from a tower's features to the decoder's width, over tensor parallel ranks.

    features [F, input] --(LayerNorm)--> Linear --GELU (exact)--> Linear --> [F, hidden]     Projector
    features [F, input] --Linear--> [F, hidden]                                              LinearProjector
    patches [P, input] --mean of blocks, RMSNorm, matrix--> [F, hidden]                      PooledProjector

The connector of LLaVA (arXiv 2310.03744), InternLM-XComposer2 and InternVL (with the norm), both linears with biases; that of
Idefics3 and SmolVLM (arXiv 2408.12637), one without; that of Gemma 3 (arXiv 2503.19786).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import scatter_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_vlm.layers.backend import backend_of
from megatron_vlm.layers.mlp import ParallelMLP
from megatron_vlm.layers.norm import make_parameter


class Projector(nn.Module):
    """Optional LayerNorm, Linear, activation, Linear; the middle is as wide as the output.

    Args:
        config: of megatron-core: ``hidden_size`` of the output, ``add_bias_linear`` true, no gating, ``activation_func``
            ``F.gelu`` (the exact form).
        input_size: width of the features.
        tp_group: ranks that the middle is split over.
        norm_epsilon: of the LayerNorm; None: there is no norm.
    """

    def __init__(self, config: TransformerConfig, input_size: int, tp_group: Any, norm_epsilon: float | None = None):
        super().__init__()
        norm = backend_of(config).norms["LayerNorm"]
        self.layernorm = nn.Identity() if norm_epsilon is None else norm(config, input_size, norm_epsilon)
        self.mlp = ParallelMLP(config, input_size, config.hidden_size, tp_group)

    def forward(self, features: Tensor) -> Tensor:
        """[F, input_size] -> [F, hidden], whole on every rank."""
        return self.mlp(self.layernorm(features))


class LinearProjector(nn.Module):
    """A linear without a bias, split by its input.

    Args:
        config: of megatron-core: ``hidden_size`` of the output.
        input_size: width of the features.
        tp_group: ranks that it is split over.
    """

    def __init__(self, config: TransformerConfig, input_size: int, tp_group: Any):
        super().__init__()
        shared = dict(config=config, init_method=config.init_method, bias=False, tp_group=tp_group)
        row = backend_of(config).row
        self.linear = row(input_size, config.hidden_size, input_is_parallel=True, skip_bias_add=False, **shared)

    def forward(self, features: Tensor) -> Tensor:
        """[F, input_size] -> [F, hidden], both whole on every rank."""
        return self.linear(scatter_to_tensor_model_parallel_region(features, group=self.linear.tp_group))[0]


class PooledProjector(nn.Module):
    """Means of square blocks of patches, a norm and a matrix, whole on every rank.

    Args:
        config: of megatron-core: ``hidden_size`` of the output, ``normalization``.
        input_size: width of the patches.
        norm_epsilon: of the norm.
        pool: patches along one side of a block.
    """

    def __init__(self, config: TransformerConfig, input_size: int, norm_epsilon: float, pool: int):
        super().__init__()
        self.pool = pool
        self.norm = backend_of(config).norm(config)(config, input_size, norm_epsilon)
        self.projection = make_parameter(torch.zeros(input_size, config.hidden_size, dtype=config.params_dtype), config)

    def forward(self, patches: Tensor, counts: Sequence[int]) -> Tensor:
        """patches [P, input_size] with ``counts`` per image, all equal squares -> features [F, hidden]."""
        side = math.isqrt(counts[0]) // self.pool
        blocks = patches.view(len(counts), side, self.pool, side, self.pool, -1)
        return self.norm(blocks.mean((2, 4)).flatten(0, 2)) @ self.projection
