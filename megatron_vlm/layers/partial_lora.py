"""Partial LoRA: linears of a decoder with a low-rank branch that acts on image tokens alone (InternLM-XComposer2).

    y = W x + m * B A dropout(x)        m: 1 where the token holds an image feature, else 0

    column parallel (qkv, fc1)          A whole on every rank, B cut as W by its rows
    row parallel (proj, fc2)            A cut as W by its columns, B whole; A x is summed over the ranks first, so that what is
                                        exchanged is ``rank`` wide and B sees, under sequence parallelism, this rank's tokens only

Legend: T tokens of the row (T / tp under sequence parallelism where a linear's input or output is so cut), R the rank.
Text tokens are masked out, not multiplied by zero, so that what overflows there stays there; they give the branch a gradient of
zero. A row without images reaches every parameter in the same order as one with, as overlapped gradient reduction needs. The
mask comes with each call of the layer, so that a recomputed layer sees its own microbatch.
Source: InternLM-XComposer2 (arXiv 2401.16420), section 3.2; alpha equals the rank there, so the scale is 1.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_vlm.errors import ConfigError
from megatron_vlm.layers.linear import Place


class LowRankBranch(nn.Module):
    """The two factors of a linear's branch, of its weight's dtype and device; its weights are to be loaded.

    Args:
        linear: which gets it.
        rank: of each block.
        blocks: parts of the output with factors of their own (2 for [gate; up]).
        dropout: probability, in training, that an input of A is left out.

    Attributes:
        text_mask: bool [T, 1, 1], of the whole row where the linear is row parallel; None: the branch does nothing.
    """

    text_mask: Tensor | None = None

    def __init__(self, linear: Any, rank: int, blocks: int, dropout: float):
        super().__init__()
        place = Place.of(linear)
        assert place is not None
        self.place, self.blocks, self.dropout = place, blocks, dropout
        self.a = nn.Parameter(linear.weight.new_empty(blocks * rank, linear.weight.shape[1]))
        self.b = nn.Parameter(linear.weight.new_empty(linear.weight.shape[0], rank))
        place.mark(self.a, self.b)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Adds the branch to what the linear made of ``x``."""
        if self.text_mask is None:
            return output
        own = self.training and self.dropout > 0 and self.place.draws_apart
        with get_cuda_rng_tracker().fork() if own else nullcontext():
            low = self.down(x)
        if self.place.row:
            low = self.place.exchange(low.masked_fill(self.text_mask, 0))
        else:
            low = self.place.exchange(low).masked_fill(self.text_mask, 0)
        return output + self.up(low)

    def down(self, x: Tensor) -> Tensor:
        """A x of every block, each with its own dropout: [T, 1, blocks * R]."""
        parts = [F.linear(F.dropout(x, self.dropout, self.training), a) for a in self.a.chunk(self.blocks)]
        return torch.cat(parts, -1)

    def up(self, low: Tensor) -> Tensor:
        """B of every block: [T, 1, blocks * R] -> [T, 1, output]."""
        parts = zip(low.chunk(self.blocks, -1), self.b.chunk(self.blocks))
        return torch.cat([F.linear(part, b) for part, b in parts], -1)


class PartialLoraLayer(TransformerLayer):
    """megatron-core's decoder layer whose four linears have branches.

    Args:
        rank, dropout: of the branches.
    """

    def __init__(self, *args: Any, rank: int, dropout: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.recompute_mlp and self.config.pipeline_model_parallel_size > 1:
            # Computed again in the backward pass, an MLP alone would find the mask of the microbatch that came last.
            raise ConfigError(
                "parallel.recompute_modules mlp does not go with partial LoRA over pipeline stages: leave mlp out, or set "
                "recompute_granularity full"
            )
        attention, mlp = self.self_attention, self.mlp
        self._adapted: tuple[Any, ...] = (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
        for linear in self._adapted:
            linear.plora = LowRankBranch(linear, rank, 2 if linear is mlp.linear_fc1 else 1, dropout)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        row = kwargs["packed_seq_params"]
        # Without a gradient to give (a token being generated), a row without images needs no branch. In training it runs it
        # even where no gradient is asked for yet: the first pass of what is recomputed draws the same numbers.
        needed = (
            self.training or torch.is_grad_enabled() or (row.image_positions is not None and len(row.image_positions))
        )
        for linear in self._adapted:
            linear.plora.text_mask = row.text_mask if needed else None
        return super().forward(*args, **kwargs)
