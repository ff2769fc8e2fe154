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

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_vlm.weights.mapping import COLUMN, GATED, REPLICATED, ROW, Entry, gated


class LowRankBranch(nn.Module):
    """The two factors of a branch.

    Args:
        like: weight of the linear, whose shape, dtype and device the factors follow.
        rank: of each block.
        blocks: parts of the output with factors of their own (2 for [gate; up]).
        dropout: probability, in training, that an input of A is left out.
    """

    def __init__(self, like: Tensor, rank: int, blocks: int, dropout: float):
        super().__init__()
        self.blocks, self.dropout = blocks, dropout
        self.a = nn.Parameter(like.new_empty(blocks * rank, like.shape[1]))
        self.b = nn.Parameter(like.new_empty(like.shape[0], rank))

    @property
    def draws(self) -> bool:
        """Random numbers are drawn."""
        return self.training and self.dropout > 0

    def down(self, x: Tensor) -> Tensor:
        """A x of every block, each with its own dropout: [T, 1, blocks * R]."""
        parts = [F.linear(F.dropout(x, self.dropout, self.training), a) for a in self.a.chunk(self.blocks)]
        return torch.cat(parts, -1)

    def up(self, low: Tensor) -> Tensor:
        """B of every block: [T, 1, blocks * R] -> [T, 1, output]."""
        parts = zip(low.chunk(self.blocks, -1), self.b.chunk(self.blocks))
        return torch.cat([F.linear(part, b) for part, b in parts], -1)


class PartialLoraColumnLinear(ColumnParallelLinear):
    """megatron-core's column parallel linear with a branch; ``text_mask`` bool [T, 1, 1], or None for none."""

    plora: LowRankBranch
    text_mask: Tensor | None = None

    def add_branch(self, rank: int, blocks: int, dropout: float) -> None:
        """Adds the branch; its weights are to be loaded."""
        self.plora = LowRankBranch(self.weight, rank, blocks, dropout)
        _sum_over_tokens(self.plora.a, self.sequence_parallel)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_, *args, **kwargs)
        if self.text_mask is None:
            return output, bias
        with _own_numbers(
            self.plora.draws and self.sequence_parallel
        ):  # ranks hold other tokens; else the same ones, and draw alike
            low = self.plora.down(input_)
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        return output + self.plora.up(low.masked_fill(self.text_mask, 0)), bias


class PartialLoraRowLinear(RowParallelLinear):
    """megatron-core's row parallel linear with a branch; ``text_mask`` bool [T, 1, 1] of the whole row, or None for none."""

    plora: LowRankBranch
    text_mask: Tensor | None = None

    def add_branch(self, rank: int, blocks: int, dropout: float) -> None:
        """Adds the branch; its weights are to be loaded."""
        self.plora = LowRankBranch(self.weight, rank, blocks, dropout)
        _sum_over_tokens(self.plora.b, self.sequence_parallel)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_)
        if self.text_mask is None:
            return output, bias
        with _own_numbers(self.plora.draws and self.tp_group.size() > 1):  # ranks hold other features
            low = self.plora.down(input_).masked_fill(self.text_mask, 0)
        if self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
        return output + self.plora.up(low), bias


class PartialLoraLayer(TransformerLayer):
    """megatron-core's decoder layer whose four linears (of the classes above) have branches.

    Args:
        rank, dropout: of the branches.
    """

    def __init__(self, *args: Any, rank: int, dropout: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        attention, mlp = self.self_attention, self.mlp
        self._adapted: tuple[Any, ...] = (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
        for linear in self._adapted:
            linear.add_branch(rank, 2 if linear is mlp.linear_fc1 else 1, dropout)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        row = kwargs["packed_seq_params"]
        # Without a gradient to give (a token being generated), a row without images needs no branch. In training it runs it
        # even where no gradient is asked for yet: the first pass of what is recomputed draws the same numbers.
        needed = (
            self.training or torch.is_grad_enabled() or (row.image_positions is not None and len(row.image_positions))
        )
        for linear in self._adapted:
            linear.text_mask = row.text_mask if needed else None
        return super().forward(*args, **kwargs)


def branch_entries(linear: str, hf: Sequence[str]) -> list[Entry]:
    """Weight map of the branch of one linear.

    Args:
        linear: in our model, column parallel (``linear_qkv``, ``linear_fc1``) or row parallel (``linear_proj``, ``linear_fc2``).
        hf: HF names of its factors, up to ``A.weight`` and ``B.weight``; those of the gate first where there are two.
    """
    row = linear.endswith(("linear_proj", "linear_fc2"))
    column = GATED if len(hf) > 1 else COLUMN
    return [
        gated(f"{linear}.plora.a", [f"{name}A.weight" for name in hf], ROW if row else REPLICATED),
        gated(f"{linear}.plora.b", [f"{name}B.weight" for name in hf], REPLICATED if row else column),
    ]


def _own_numbers(own: bool) -> AbstractContextManager:
    """Dropout in what is split over ranks draws from megatron-core's generator of the rank, else from the common one."""
    return get_cuda_rng_tracker().fork() if own else nullcontext()


def _sum_over_tokens(parameter: nn.Parameter, sequence_parallel: bool) -> None:
    """A replicated parameter that sees only this rank's tokens: finalize_model_grads sums its gradient over the ranks."""
    parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
