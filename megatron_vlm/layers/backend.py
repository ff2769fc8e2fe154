"""Which class makes a linear, a norm, a core attention: the one place that decides.

    TransformerConfig.transformer_impl --backend_of--> Backend --> layers, MLPs, connectors, and what adapters find in them

``local``: megatron-core's linears with the seams of ``linear.py``, torch's norms, attention over packed rows. Which kernel
attends is chosen at run time, by device and dtype (``attention.py``).
"""

from dataclasses import dataclass

from megatron.core.transformer import TransformerConfig
from torch import nn

from megatron_vlm.layers.core_attention import CoreAttention
from megatron_vlm.layers.linear import ColumnLinear, RowLinear, UnbiasedColumnLinear
from megatron_vlm.layers.norm import LayerNorm, RMSNorm


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Classes, with the constructors that megatron-core's layer specs call.

    Attributes:
        column, row: linears.
        unbiased_column: a column parallel one that never has a bias.
        norms: by megatron-core's ``normalization``.
        core_attention: between the linears of an attention.
    """

    column: type[ColumnLinear]
    row: type[RowLinear]
    unbiased_column: type[ColumnLinear]
    norms: dict[str, type[nn.Module]]
    core_attention: type[nn.Module]

    def norm(self, config: TransformerConfig) -> type[nn.Module]:
        """The norm of a part's layers."""
        return self.norms[config.normalization]


BACKENDS = {
    "local": Backend(
        column=ColumnLinear,
        row=RowLinear,
        unbiased_column=UnbiasedColumnLinear,
        norms={"RMSNorm": RMSNorm, "LayerNorm": LayerNorm},
        core_attention=CoreAttention,
    )
}


def backend_of(config: TransformerConfig) -> Backend:
    """What a part of this config is made of."""
    return BACKENDS[config.transformer_impl]
