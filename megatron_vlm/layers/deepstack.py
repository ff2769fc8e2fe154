"""DeepStack: features of several levels of a tower, added to what comes out of the first layers of a decoder.

    embeddings | level 0 | level 1  --layer 0-->  hidden + level 0 | level 1  --layer 1-->  hidden + level 1  --layer 2--> ...
    [T, 1, (1 + n) H]                             [T, 1, n H]                               [T, 1, H]

Levels still to come lie behind the hidden states, zeros where a token is no image's: so they go with the tokens wherever these
go, over sequence and context parallel ranks, to the next pipeline stage, and into and out of layers that are computed again. A
row without images has none.

Legend: T tokens of the row on this rank, H hidden size, n levels. Source: arXiv 2406.04334; transformers 5.23,
models/qwen3_vl/modeling_qwen3_vl.py, ``_deepstack_process``.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class DeepStackLayer(TransformerLayer):
    """megatron-core's decoder layer, which adds the first of the levels that come with its input to its output."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """[T, 1, H and levels] -> the same with one level less."""
        width = self.config.hidden_size
        if hidden_states.shape[-1] == width:
            return super().forward(hidden_states=hidden_states, **kwargs)
        # Contiguous: a view, which norms keep for the backward pass, would keep the levels too.
        own, level, rest = hidden_states.split([width, width, hidden_states.shape[-1] - 2 * width], -1)
        output, context = super().forward(hidden_states=own.contiguous(), **kwargs)
        return torch.cat([output + level, rest], -1), context
