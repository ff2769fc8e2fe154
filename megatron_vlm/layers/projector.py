"""MLP projector from a tower's features to the decoder's width, over tensor parallel ranks.

    features [F, input] --(LayerNorm)--> Linear --GELU (exact)--> Linear --> [F, hidden]

The connector of LLaVA (arXiv 2310.03744), InternLM-XComposer2 and InternVL (with the norm). Both linears have biases.
"""

from collections.abc import Sequence
from typing import Any

from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_vlm.layers.mlp import ParallelMLP
from megatron_vlm.layers.norm import LayerNorm
from megatron_vlm.weights.mapping import COLUMN, ROW, Entry, direct


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
        self.layernorm = nn.Identity() if norm_epsilon is None else LayerNorm(config, input_size, norm_epsilon)
        self.mlp = ParallelMLP(config, input_size, config.hidden_size, tp_group)

    def forward(self, features: Tensor) -> Tensor:
        """[F, input_size] -> [F, hidden], whole on every rank."""
        return self.mlp(self.layernorm(features))


def projector_entries(name: str, linears: Sequence[str], norm: str | None = None) -> list[Entry]:
    """Weight map of a ``Projector``.

    Args:
        name: of the module in our model, with its dot (``connector.``).
        linears: HF names of the two linears, without ``.weight``.
        norm: HF name of the norm.
    """
    entries = []
    for kind in ("weight", "bias"):
        if norm:
            entries.append(direct(f"{name}layernorm.{kind}", f"{norm}.{kind}"))
        entries.append(direct(f"{name}mlp.linear_fc1.{kind}", f"{linears[0]}.{kind}", COLUMN))
    entries.append(direct(f"{name}mlp.linear_fc2.weight", f"{linears[1]}.weight", ROW))
    entries.append(direct(f"{name}mlp.linear_fc2.bias", f"{linears[1]}.bias"))
    return entries
