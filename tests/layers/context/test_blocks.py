"""Tokens that see each other inside causal attention against softmax with the mask written out, on one rank and over several."""

import math
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.layers.attention import attention
from megatron_vlm.layers.context.attention import Deal, context_attention
from megatron_vlm.layers.context.blocks import Blocks
from megatron_vlm.testing.distributed import run_distributed

CLOSE = 1e-12  # of the largest, in fp64
CPU = torch.device("cpu")
# Segments, and blocks: at the ends of a segment, next to one another, longer than windows and than a rank's share.
ROWS = {
    "mixed": ((0, 7, 60, 100, 132), ((0, 5), (10, 19), (19, 30), (55, 60), (60, 90), (131, 132))),
    "one": ((0, 96), ((3, 80),)),
    "none": ((0, 24, 40), ()),
}


def explicit(q, k, v, starts, runs, window):
    """Softmax over each query's keys: those before it in its segment, and those of its block, none before the window."""
    total, repeat = len(q), q.shape[1] // k.shape[1]
    place = torch.arange(total)
    segment = torch.searchsorted(torch.tensor(starts), place, right=True)
    block = torch.full((total,), -1)
    for number, (a, b) in enumerate(runs):
        block[a:b] = number
    seen = (place[None] <= place[:, None]) | ((block[None] == block[:, None]) & (block[:, None] >= 0))
    seen &= segment[None] == segment[:, None]
    if window is not None:
        seen &= place[None] > place[:, None] - window
    keys, values = (x.repeat_interleave(repeat, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, keys) / math.sqrt(q.shape[2])
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)


def one_rank(q, k, v, starts, runs, window):
    lengths = [b - a for a, b in pairwise(starts)]
    cu = torch.tensor(starts, dtype=torch.int32)
    out = attention(q, k, v, cu, cu, max(lengths), max(lengths), True, window)
    call = Blocks(starts, runs, CPU).whole(window)
    return out if call is None else call.replace(out, q, k, v, window)


def draw(starts, heads, groups):
    torch.manual_seed(0)
    return [torch.randn(starts[-1], n, 8, dtype=torch.float64) for n in (heads, groups, groups, heads)]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("window", [None, 1, 4, 12, 500])
def test_one_rank_equals_the_mask(name, window):
    starts, runs = ROWS[name]
    q, k, v, weight = draw(starts, 4, 2)
    results = []
    for function in (explicit, one_rank):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*inputs, starts, runs, window)
        (out * weight).sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    for wanted, found in zip(*results):
        assert float((wanted - found).abs().max()) <= CLOSE * max(1.0, float(wanted.abs().max()))


def errors_of(cases):
    return [errors(**case) for case in cases]


def errors(name, window, exchange):
    """On a rank: the largest differences of output and gradients from one rank's mask."""
    starts, runs = ROWS[name]
    q, k, v, weight = draw(starts, 8, 4)
    full = [x.clone().requires_grad_() for x in (q, k, v)]
    wanted = explicit(*full, starts, runs, window)
    (wanted * weight).sum().backward()
    deal = Deal(starts, dist.get_world_size(), dist.get_rank(), dist.group.WORLD, CPU, exchange)
    local = [x[deal.index].clone().requires_grad_() for x in (q, k, v)]
    out = context_attention(*local, deal, window, blocks=Blocks(starts, runs, CPU))
    (out * weight[deal.index]).sum().backward()
    pairs = [(out.detach(), wanted.detach()[deal.index]), *((x.grad, y.grad[deal.index]) for x, y in zip(local, full))]
    return max(float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in pairs)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_equal_the_mask(size):
    cases = [
        dict(name=name, window=window, exchange=exchange)
        for name in ROWS
        for window in (None, 4, 12)
        for exchange in ("gather", "heads")
    ]
    for result in run_distributed(errors_of, cases, dp=size):
        assert max(result) <= CLOSE, [(case, error) for case, error in zip(cases, result) if error > CLOSE]


def test_a_part_of_a_block_sees_its_end():
    """Pieces of a rank that has the middle of a block: keys from the window of its first query to the end of the block."""
    blocks = Blocks((0, 5, 40), ((10, 30),), CPU)
    assert blocks.pieces([(0, 8), (12, 20)], None) == [(5, 12, 20, 30)]
    assert blocks.pieces([(12, 20)], 3) == [(10, 12, 20, 30)]
    call = blocks.call([(12, 20)], 3, torch.arange(12, 20), torch.arange(10, 30))
    assert call.queries.tolist() == [*range(8), *[7] * 10] and call.kept.tolist() == list(range(8))
    assert (call.rows.tolist(), call.slices, call.max_q, call.max_k) == (list(range(8)), [(0, 20)], 18, 20)
    assert blocks.call([(0, 8), (30, 40)], None, torch.arange(18), torch.arange(18)) is None
