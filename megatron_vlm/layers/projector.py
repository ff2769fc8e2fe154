"""Projectors from a tower's features to the decoder's width, over tensor parallel ranks.

    features [F, input] --(LayerNorm)--> Linear --GELU (exact)--> Linear --> [F, hidden]     Projector
    features [F, input] --Linear--> [F, hidden]                                              LinearProjector

The connector of LLaVA (arXiv 2310.03744), InternLM-XComposer2 and InternVL (with the norm), both linears with biases; that of
Idefics3 and SmolVLM (arXiv 2408.12637), one without.
"""

from typing import Any

from megatron.core.tensor_parallel.mappings import scatter_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_vlm.layers.backend import backend_of
from megatron_vlm.layers.mlp import ParallelMLP


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
