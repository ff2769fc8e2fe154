"""Which class makes a linear, a norm, a core attention: the one place that decides.

    TransformerConfig.transformer_impl --backend_of--> Backend --> layers, MLPs, connectors, and what adapters find in them

``local``: megatron-core's linears with the seams of ``linear.py``, torch's norms, attention over packed rows. Which kernel
attends is chosen at run time, by device and dtype (``attention.py``). ``fused``: the same, with what lies between the products
in fewer kernels (``fused.py``). ``transformer_engine`` and ``apex``: as ``fused``, with products and norms, or norms, of these
packages (``engines.py``).
"""

import dataclasses
from dataclasses import dataclass

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from torch import nn

from megatron_vlm.layers.core_attention import CoreAttention
from megatron_vlm.layers.engines import (
    ApexLayerNorm,
    ApexRMSNorm,
    EngineColumnLinear,
    EngineLayerNorm,
    EngineRMSNorm,
    EngineRowLinear,
    EngineUnbiasedColumnLinear,
)
from megatron_vlm.layers.fused import (
    FusedColumnLinear,
    FusedMLP,
    FusedRowLinear,
    FusedSelfAttention,
    FusedUnbiasedColumnLinear,
)
from megatron_vlm.layers.linear import ColumnLinear, RowLinear, UnbiasedColumnLinear
from megatron_vlm.layers.norm import HeadRMSNorm, LayerNorm, RMSNorm


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Classes, with the constructors that megatron-core's layer specs call.

    Attributes:
        column, row: linears.
        unbiased_column: a column parallel one that never has a bias.
        norms: by megatron-core's ``normalization``.
        head_norm: of each head of queries and keys.
        mlp: two linears and what lies between them.
        self_attention: linears, and core attention between them.
        core_attention: over a row's segments.
        rotates: ``self_attention`` applies RoPE itself, by ``RowParams.rotation``.
    """

    column: type[ColumnLinear]
    row: type[RowLinear]
    unbiased_column: type[ColumnLinear]
    norms: dict[str, type[nn.Module]]
    head_norm: type[nn.Module]
    mlp: type[MLP]
    self_attention: type[SelfAttention]
    core_attention: type[nn.Module]
    rotates: bool = False

    def norm(self, config: TransformerConfig) -> type[nn.Module]:
        """The norm of a part's layers."""
        return self.norms[config.normalization]


_LOCAL = Backend(
    column=ColumnLinear,
    row=RowLinear,
    unbiased_column=UnbiasedColumnLinear,
    norms={"RMSNorm": RMSNorm, "LayerNorm": LayerNorm},
    head_norm=HeadRMSNorm,
    mlp=MLP,
    self_attention=SelfAttention,
    core_attention=CoreAttention,
)
_FUSED = dataclasses.replace(
    _LOCAL,
    column=FusedColumnLinear,
    row=FusedRowLinear,
    unbiased_column=FusedUnbiasedColumnLinear,
    mlp=FusedMLP,
    self_attention=FusedSelfAttention,
    rotates=True,
)
BACKENDS = {
    "local": _LOCAL,
    "fused": _FUSED,
    "transformer_engine": dataclasses.replace(
        _FUSED,
        column=EngineColumnLinear,
        row=EngineRowLinear,
        unbiased_column=EngineUnbiasedColumnLinear,
        norms={"RMSNorm": EngineRMSNorm, "LayerNorm": EngineLayerNorm},
    ),
    "apex": dataclasses.replace(_FUSED, norms={"RMSNorm": ApexRMSNorm, "LayerNorm": ApexLayerNorm}),
}


def backend_of(config: TransformerConfig) -> Backend:
    """What a part of this config is made of."""
    return BACKENDS[config.transformer_impl]
