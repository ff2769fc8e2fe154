"""Blocks of a row whose tokens see each other both ways inside causal attention: the tokens of an image (Gemma 3).

    causal attention of the whole row --> the queries of the blocks once more, over all keys up to the end of their block
    --> these in the place of what they gave before

A mask that no kernel for packed rows can say in one call is said in two calls that every one can: the second has a segment for
each block, without the causal bound. A window still bounds what lies before a query. What is given twice is the queries of
images alone, and keys and values of what lies before them. Legend: H heads, G key/value heads, D of a head.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.layers.attention import attention, to_device

Intervals = Sequence[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class BlockCall:
    """The second call of ``attention``, for the queries and keys that a rank has.

    Attributes:
        queries: int64, rows of the queries; where a rank has not the end of a block, its last one fills it up to there, so that
            the ends of queries and keys are aligned.
        kept: int64, which outputs are taken; None: all.
        rows: int64, where they go.
        slices: of the keys, those of each block.
        cu_q, cu_k, max_q, max_k: of ``attention``.
    """

    queries: Tensor
    kept: Tensor | None
    rows: Tensor
    slices: list[tuple[int, int]]
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int

    def replace(self, output: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Returns the ``output`` [n, H, D] of causal attention with that of the blocks' queries in its place.

        Args:
            output, q: [n, H, D].
            k, v: [m, G, D].
            window: keys that a query sees up to itself; None: all of its segment.
        """
        keys, values = _Take.apply(torch.cat([k, v], 1), self.slices).split(k.shape[1], 1)
        sizes = self.cu_q, self.cu_k, self.max_q, self.max_k
        seen = attention(q.index_select(0, self.queries), keys, values, *sizes, causal=False, window=window)
        return output.index_copy(0, self.rows, seen if self.kept is None else seen.index_select(0, self.kept))


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of one row.

    Attributes:
        starts: of the row's segments, and T at the end.
        runs: [first, end) of each block, in order, none over two segments.
        device: of the row.
    """

    starts: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]
    device: torch.device

    def pieces(self, intervals: Intervals, window: int | None) -> list[tuple[int, int, int, int]]:
        """(first key, first query, end of the queries, end of the keys) of each block's part that lies in the intervals."""
        found = []
        for a, b in self.runs:
            start = max(s for s in self.starts if s <= a)
            for low, high in intervals:
                first, last = max(a, low), min(b, high)
                if first < last:
                    found.append((start if window is None else max(start, first - window + 1), first, last, b))
        return found

    def call(self, intervals: Intervals, window: int | None, queries: Tensor, keys: Tensor) -> BlockCall | None:
        """The call for a rank with the tokens of ``intervals``; None: no block has one of them.

        ``queries`` and ``keys``: int64, ascending, positions in the row of those at hand.
        """
        pieces = self.pieces(intervals, window)
        if not pieces:
            return None
        at = torch.searchsorted(queries, torch.tensor([first for _, first, _, _ in pieces])).tolist()
        key_at = torch.searchsorted(keys, torch.tensor([key for key, *_ in pieces])).tolist()
        real = [last - first for _, first, last, _ in pieces]
        whole = [end - first for _, first, _, end in pieces]
        lengths = [end - key for key, _, _, end in pieces]
        rows = torch.cat([torch.arange(a, a + n) for a, n in zip(at, real)])
        filled = [torch.arange(a, a + m).clamp(max=a + n - 1) for a, n, m in zip(at, real, whole)]
        begins = accumulate(whole[:-1], initial=0)
        kept = [torch.arange(begin, begin + n) for begin, n in zip(begins, real)]
        return BlockCall(
            queries=to_device(torch.cat(filled), self.device),
            kept=None if real == whole else to_device(torch.cat(kept), self.device),
            rows=to_device(rows, self.device),
            slices=[(a, a + n) for a, n in zip(key_at, lengths)],
            cu_q=to_device(_starts(whole), self.device),
            cu_k=to_device(_starts(lengths), self.device),
            max_q=max(whole),
            max_k=max(lengths),
        )

    @functools.cached_property
    def _whole(self) -> dict[int | None, BlockCall | None]:
        return {}

    def whole(self, window: int | None) -> BlockCall | None:
        """The call for a rank with all tokens of the row, made once a row."""
        if window not in self._whole:
            every = torch.arange(self.starts[-1])
            self._whole[window] = self.call([(0, self.starts[-1])], window, every, every)
        return self._whole[window]


class _Take(torch.autograd.Function):
    """Slices of x, end to end; gradients of what several have are summed in fp32, in order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slices: list[tuple[int, int]]) -> Tensor:
        ctx.slices, ctx.count = slices, len(x)
        return torch.cat([x[a:b] for a, b in slices])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(ctx.count, *grad.shape[1:], dtype=wide)
        for (a, b), part in zip(ctx.slices, grad.split([b - a for a, b in ctx.slices])):
            total[a:b] += part
        return total.to(grad.dtype), None


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
