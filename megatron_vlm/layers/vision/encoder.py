"""The bidirectional layers of a tower."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self

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

    def parts(self, after: Sequence[int]) -> "list[Self]":
        """Its layers in blocks one behind the other, one that ends with each layer of ``after`` and one of what is left.

        Of an encoder without a final norm. They are the same layers: a block holds none of its own, and is made for a pass.
        """
        parts = []
        for start, stop in pairwise((0, *(layer + 1 for layer in after), len(self.layers))):
            part = copy.copy(self)
            part._modules = {**self._modules, "layers": self.layers[start:stop]}
            part.num_layers_per_pipeline_rank = stop - start
            parts.append(part)
        return parts
