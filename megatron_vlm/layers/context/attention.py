"""Context parallelism: a packed row over several ranks, each with its own tokens, and attention over all of them.

    starts of the segments --deal--> Deal: the tokens of each rank, even in number and in attention's work
    q, k, v [T / cp, ...]  --context_attention--> [T / cp, H, D], as one rank gives for the whole row
        gather  each rank gets the keys and values that its queries see, once: any number of heads, only neighbours under a window
        heads   all tokens, some heads (all-to-all): where query and key/value heads divide by cp

Everything here is a pure function of the row's segments, which every rank of the group knows: nothing is asked of others but
keys, values and their gradients. Shapes: T tokens of the row, n = T / cp of a rank; H heads, G key/value heads, D of a head.
"Ulysses": Jacobs et al. 2023. The dealing is ours: zigzag as of Brandon et al. 2023 (striped attention) and Megatron-LM, but over
each long segment by itself, so that rows of many samples balance too.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_vlm.errors import ConfigError
from megatron_vlm.layers.attention import attention, to_device
from megatron_vlm.layers.context.blocks import BlockCall, Blocks

Exchange = Literal["auto", "gather", "heads"]
Intervals = tuple[tuple[int, int], ...]
_HEADS_FROM = 8  # ranks: below, keys and values of the queries' segments are fewer bytes than all tokens of some heads
_SHORT = 4  # segments below 1 / (4 cp) of the row are not cut in pairs: what that would even out is less than the short ones fill


@functools.lru_cache(maxsize=64)
def deal_tokens(starts: tuple[int, ...], size: int) -> tuple[Intervals, ...]:
    """Intervals [a, b) of the row that each of ``size`` ranks holds, in the row's order: T / size tokens each, exactly.

    A long segment is cut into 2 size pieces, of which rank i takes the i-th from either end: the same share of its causal
    triangle. Short ones, laid end to end, fill each rank up. Work of attention on random rows: within 1.06 of even, and within
    1.002 with all else of a decoder (tests/layers/context/test_attention.py, benchmarks/long_rows.py).

    Args:
        starts: of the row's segments, and T at the end.
        size: of the context parallel group.

    Raises:
        ValueError: T is not a multiple of ``size``.
    """
    total = starts[-1]
    if total % size:
        raise ValueError(f"a row of {total} tokens does not divide over {size} context parallel ranks")
    held = [0] * size
    found: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    short = []
    for start, end in pairwise(starts):
        length = end - start
        if length * _SHORT * size <= total:
            short.append((start, end))
            continue
        counts = [length // size] * size
        for rank in sorted(range(size), key=held.__getitem__)[: length % size]:
            counts[rank] += 1  # totals of the ranks never differ by more than one token
        front = [(count + 1) // 2 for count in counts]
        back = [count - first for count, first in zip(counts, front)]
        pieces = [*enumerate(front), *reversed(list(enumerate(back)))]
        for (rank, count), place in zip(pieces, accumulate((count for _, count in pieces), initial=start)):
            found[rank].append((place, place + count))
        held = [a + b for a, b in zip(held, counts)]
    rank = 0
    for start, end in short:
        while start < end:
            while held[rank] == total // size:
                rank += 1
            count = min(end - start, total // size - held[rank])
            found[rank].append((start, start + count))
            held[rank] += count
            start += count
    return tuple(_merged(sorted(intervals)) for intervals in found)


def _merged(intervals: Sequence[tuple[int, int]]) -> Intervals:
    merged: list[tuple[int, int]] = []
    for a, b in intervals:
        if a == b:
            continue
        if merged and merged[-1][1] == a:
            merged[-1] = (merged[-1][0], b)
        else:
            merged.append((a, b))
    return tuple(merged)


def _index(intervals: Intervals) -> Tensor:
    return torch.cat([torch.arange(a, b) for a, b in intervals])


@dataclass(frozen=True, eq=False)
class Deal:
    """How one row lies over a context parallel group, seen from one of its ranks.

    Attributes:
        starts: of the row's segments, and T.
        size, rank: of the group.
        group: the process group.
        device: where the exchange happens.
        exchange: of keys and values.
    """

    starts: tuple[int, ...]
    size: int
    rank: int
    group: Any
    device: torch.device
    exchange: Exchange = "auto"

    @functools.cached_property
    def intervals(self) -> tuple[Intervals, ...]:
        """Of each rank."""
        return deal_tokens(self.starts, self.size)

    @functools.cached_property
    def index(self) -> Tensor:
        """int64 [n] on the host: this rank's tokens, as positions in the row, ascending."""
        return _index(self.intervals[self.rank])

    @functools.cached_property
    def segments(self) -> Tensor:
        """int64 [n] on the device: number of the segment of each of this rank's tokens."""
        numbers = torch.searchsorted(torch.tensor(self.starts), self.index, right=True).sub_(1)
        return to_device(numbers, self.device)

    @functools.cached_property
    def order(self) -> tuple[Tensor, Tensor]:
        """Tokens as the ranks hold them, rank after rank, -> the row, and back: two permutations, int64 [T] on the device."""
        held = torch.cat([_index(intervals) for intervals in self.intervals])
        return to_device(torch.argsort(held), self.device), to_device(held, self.device)

    @functools.cached_property
    def _gathers(self) -> dict[int | None, "_Gather"]:
        return {}

    def gather(self, window: int | None, blocks: Blocks | None = None) -> "_Gather":
        """What this rank's queries need under a window, made once a row, of which the ``blocks`` are."""
        if window not in self._gathers:
            self._gathers[window] = _Gather.of(self, window, blocks)
        return self._gathers[window]

    def received_tokens(self, window: int | None) -> int:
        """Tokens whose keys and values come from other ranks (a figure for benchmarks and estimates)."""
        gather = self.gather(window)
        return sum(count for rank, count in enumerate(gather.receives) if rank != self.rank)


def _pieces(starts: Sequence[int], intervals: Intervals, window: int | None) -> list[tuple[int, int, int]]:
    """(first key, first query, end of both) of each piece of a segment that lies in the intervals."""
    found, segment = [], 0
    for a, b in intervals:
        while starts[segment + 1] <= a:
            segment += 1
        number = segment
        while number < len(starts) - 1 and starts[number] < b:
            first, last = max(starts[number], a), min(starts[number + 1], b)
            # A query sees ``window`` keys, itself included: what lies before those of the first query is seen by none.
            key = starts[number] if window is None else max(starts[number], first - window + 1)
            if first < last:
                found.append((key, first, last))
            number += 1
    return found


@dataclass(frozen=True, eq=False)
class _Gather:
    """Which keys go where, for one rank, row and window.

    Attributes:
        sends: int64, of this rank's tokens, those that rank 0, 1, ... need, one after the other; ``sent`` how many each.
        receives: tokens that come from each rank.
        arrange: int64, from the order of arrival to the row's.
        slices: of what was arranged, the keys of each piece.
        cu_q, cu_k, max_q, max_k: of the call of ``attention``.
        blocks: the call after it, for tokens that see each other.
    """

    sends: Tensor
    sent: list[int]
    receives: list[int]
    arrange: Tensor
    slices: list[tuple[int, int]]
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    blocks: BlockCall | None

    @classmethod
    def of(cls, deal: Deal, window: int | None, blocks: Blocks | None = None) -> "_Gather":
        owner, local = torch.empty(2, deal.starts[-1], dtype=torch.int64)
        for rank, intervals in enumerate(deal.intervals):
            index = _index(intervals)
            owner[index], local[index] = rank, torch.arange(len(index))
        pieces = [_pieces(deal.starts, intervals, window) for intervals in deal.intervals]
        seen = [[(key, last) for key, _, last in theirs] for theirs in pieces]
        if blocks is not None:
            for theirs, intervals in zip(seen, deal.intervals):
                theirs += [(key, end) for key, _, _, end in blocks.pieces(intervals, window)]
        sends = []
        for theirs in seen:
            need = _needed(theirs, deal.starts[-1])
            sends.append(local[need[owner[need] == deal.rank]])
        need = _needed(seen[deal.rank], deal.starts[-1])
        order = torch.argsort(owner[need], stable=True)  # arrival: by rank, each rank's in the row's order
        first = torch.searchsorted(need, torch.tensor([key for key, _, _ in pieces[deal.rank]])).tolist()
        mine = pieces[deal.rank]
        queries, keys = [last - query for _, query, last in mine], [last - key for key, _, last in mine]
        return cls(
            sends=to_device(torch.cat(sends), deal.device),
            sent=[len(part) for part in sends],
            receives=torch.bincount(owner[need], minlength=deal.size).tolist(),
            arrange=to_device(torch.argsort(order), deal.device),
            slices=[(start, start + length) for start, length in zip(first, keys)],
            cu_q=to_device(_starts(queries), deal.device),
            cu_k=to_device(_starts(keys), deal.device),
            max_q=max(queries),
            max_k=max(keys),
            blocks=None if blocks is None else blocks.call(deal.intervals[deal.rank], window, deal.index, need),
        )


def _needed(pieces: Sequence[tuple[int, int]], total: int) -> Tensor:
    """Positions of all keys [first, end) of some pieces, each once, ascending."""
    need = torch.zeros(total, dtype=torch.bool)
    for key, last in pieces:
        need[key:last] = True
    return need.nonzero()[:, 0]


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


class AllToAll(torch.autograd.Function):
    """x [sum(sent), ...] -> [sum(receives), ...]: the rows for rank 0, 1, ... go there; gradients come back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], receives: list[int], group: Any) -> Tensor:
        ctx.back = receives, sent, group
        return all_to_all(x, sent, receives, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return all_to_all(grad, *ctx.back), None, None, None


def all_to_all(x: Tensor, sent: list[int], receives: list[int], group: Any) -> Tensor:
    """Rows of x [sum(sent), ...] for rank 0, 1, ... go there; returns what comes from each [sum(receives), ...]. No gradients."""
    out = x.new_empty(sum(receives), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receives, sent, group=group)
    return out


class _Send(torch.autograd.Function):
    """x [n, ...] -> what other ranks need of it, rank after rank; a token's gradients are summed over them in fp32, in order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: _Gather) -> Tensor:
        ctx.gather, ctx.count = gather, len(x)
        return x.index_select(0, gather.sends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(ctx.count, *grad.shape[1:], dtype=wide)
        parts = zip(grad.split(ctx.gather.sent), ctx.gather.sends.split(ctx.gather.sent))
        for part, index in parts:  # an index holds each token once, so that the sum does not depend on timing
            total.index_add_(0, index, part.to(wide))
        return total.to(grad.dtype), None


def check_heads(num_heads: int, num_query_groups: int, size: int, tp: int) -> str | None:
    """Why heads cannot be exchanged over ``size`` ranks; None: they can."""
    for name, count in (("attention heads", num_heads), ("key/value heads", num_query_groups)):
        if count % (tp * size):
            return f"{count} {name} do not divide by tp {tp} x cp {size}"
    return None


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    deal: Deal,
    window: int | None = None,
    *,
    recompute: bool = True,
    blocks: Blocks | None = None,
) -> Tensor:
    """Causal attention of this rank's queries over the keys of all ranks. A collective of ``deal.group``, forward and backward.

    Args:
        q: [n, H, D].
        k, v: [n, G, D].
        deal: of the row.
        window: keys a query sees, itself included; None: all of its segment.
        recompute: keys and values of other ranks are not kept for the backward pass but exchanged again, which costs one more
            attention; False where the caller recomputes the layer as a whole.
        blocks: of the whole row, tokens that see each other both ways.

    Returns:
        [n, H, D].

    Raises:
        ConfigError: exchange by heads where they do not divide.
    """
    problem = check_heads(q.shape[1], k.shape[1], deal.size, 1)
    if deal.exchange == "heads" or (
        deal.exchange == "auto" and deal.size >= _HEADS_FROM and not window and not problem
    ):
        if problem:
            raise ConfigError(
                f"parallel.context_parallel_exchange is heads, but on a tensor parallel rank {problem}: set gather or auto"
            )
        return _by_heads(q, k, v, deal, window, blocks)
    if recompute and torch.is_grad_enabled():
        return checkpoint(_by_keys, q, k, v, deal, window, blocks, use_reentrant=False, preserve_rng_state=False)
    return _by_keys(q, k, v, deal, window, blocks)


def _by_keys(q: Tensor, k: Tensor, v: Tensor, deal: Deal, window: int | None, blocks: Blocks | None) -> Tensor:
    gather, groups = deal.gather(window, blocks), k.shape[1]
    both = _Send.apply(torch.cat([k, v], 1), gather)
    both = AllToAll.apply(both, gather.sent, gather.receives, deal.group).index_select(0, gather.arrange)
    keys, values = both.split(groups, 1)
    k, v = keys, values
    if len(gather.slices) != 1 or gather.blocks is not None:
        k, v = torch.cat([both[a:b] for a, b in gather.slices]).split(groups, 1)
    sizes = gather.cu_q, gather.cu_k, gather.max_q, gather.max_k
    out = attention(q, k, v, *sizes, causal=True, window=window)
    return out if gather.blocks is None else gather.blocks.replace(out, q, keys, values, window)


def _by_heads(q: Tensor, k: Tensor, v: Tensor, deal: Deal, window: int | None, blocks: Blocks | None) -> Tensor:
    to_row, to_ranks = deal.order
    lengths = [b - a for a, b in pairwise(deal.starts)]
    cu = to_device(_starts(lengths), deal.device)
    queries, keys, values = (_to_heads(x, deal).index_select(0, to_row) for x in (q, k, v))
    out = attention(queries, keys, values, cu, cu, max(lengths), max(lengths), causal=True, window=window)
    call = blocks.whole(window) if blocks is not None else None
    out = out if call is None else call.replace(out, queries, keys, values, window)
    size, count = deal.size, len(q)
    out = AllToAll.apply(out.index_select(0, to_ranks), [count] * size, [count] * size, deal.group)
    return out.view(size, count, -1, q.shape[2]).transpose(0, 1).reshape(count, -1, q.shape[2])


def _to_heads(x: Tensor, deal: Deal) -> Tensor:
    """[n, H, D] -> [T, H / cp, D], tokens rank after rank."""
    count, heads, dim = x.shape
    parts = x.view(count, deal.size, heads // deal.size, dim).transpose(0, 1).reshape(-1, heads // deal.size, dim)
    return AllToAll.apply(parts, [count] * deal.size, [count] * deal.size, deal.group)


def attention_work(starts: Sequence[int], intervals: Intervals, window: int | None = None) -> int:
    """Pairs of query and key that a rank's intervals see: attention's work, for balance and estimates."""
    pairs = 0
    for _, first, last in _pieces(starts, intervals, None):
        begin = max(s for s in starts if s <= first)
        seen = range(first - begin + 1, last - begin + 1)
        if window is None:
            pairs += (seen[0] + seen[-1]) * len(seen) // 2
        else:
            full = max(0, seen[-1] - max(window, seen[0]) + 1)
            rest = len(seen) - full
            pairs += full * window + (2 * seen[0] + rest - 1) * rest // 2
    return pairs
