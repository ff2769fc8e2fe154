"""The bidirectional layers of a tower."""

from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor


class Encoder(TransformerBlock):
    """megatron-core's block, which also recomputes layers that train behind an input that needs no gradient.

    megatron-core's recomputation gives no gradient at all to layers whose input needs none, as behind frozen embeddings.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[T, 1, Hv] -> the same."""
        needed = torch.is_grad_enabled() and self.config.recompute_granularity is not None
        if needed and not hidden_states.requires_grad and any(p.requires_grad for p in self.parameters()):
            hidden_states = hidden_states.detach().requires_grad_()
        return super().forward(hidden_states, *args, **kwargs)
