"""Attention over context parallel ranks is that of one rank; tokens and work are dealt evenly."""

import dataclasses
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlm.errors import ConfigError
from megatron_vlm.layers.attention import attention
from megatron_vlm.layers.context.attention import Deal, attention_work, check_heads, context_attention, deal_tokens
from megatron_vlm.testing.distributed import run_distributed

CLOSE = {torch.float32: 1e-6, torch.float64: 1e-12}  # of the largest value; measured 4e-7 and 2e-15


def random_starts(draw: random.Random, size: int, multiple: int = 1) -> tuple[int, ...]:
    starts = [0]
    for _ in range(draw.randint(1, 12)):
        starts.append(starts[-1] + int(draw.lognormvariate(4, 1.5)) + 1)
    if filler := -starts[-1] % (size * multiple):
        starts.append(starts[-1] + filler)
    return tuple(starts)


def test_every_token_is_dealt_once_and_evenly():
    draw = random.Random(0)
    for _ in range(2000):
        size = draw.choice([2, 3, 4, 8])
        starts = random_starts(draw, size)
        dealt = deal_tokens(starts, size)
        tokens = sorted(t for intervals in dealt for a, b in intervals for t in range(a, b))
        assert tokens == list(range(starts[-1]))
        assert {sum(b - a for a, b in intervals) for intervals in dealt} == {starts[-1] // size}


def test_a_row_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="row of 10 tokens does not divide over 4"):
        deal_tokens((0, 10), 4)


def decoder_work(starts: tuple[int, ...], intervals: Any) -> float:
    """FLOPs of Mistral 7B's decoder per layer and forward pass, attention's pairs and products of the tokens."""
    tokens = sum(b - a for a, b in intervals)
    return 4 * 4096 * attention_work(starts, intervals) + 2 * 218_103_808 * tokens


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("name", ["16k of short samples", "64k of short samples", "40k and short", "one of 64k"])
def test_attention_and_tokens_are_balanced(name, size):
    draw = random.Random(1)
    total = 16384 if name.startswith("16k") else 65536
    lengths = [40960] if name.startswith("40k") else [total] if name.startswith("one") else []
    while sum(lengths) < total:
        lengths.append(min(draw.randint(50, 2000), total - sum(lengths)))
    starts = tuple(sum(lengths[:i]) for i in range(len(lengths) + 1))
    dealt = deal_tokens(starts, size)
    work = [decoder_work(starts, intervals) for intervals in dealt]
    attended = sum(attention_work(starts, intervals) for intervals in dealt)
    assert attended == sum(n * (n + 1) // 2 for n in lengths)
    assert max(work) * size / sum(work) <= 1.02


def test_work_under_a_window_is_counted():
    starts, intervals = (0, 7, 30), ((3, 9), (12, 20))
    pairs = [
        (q, k)
        for a, b in intervals
        for q in range(a, b)
        for s, e in pairwise(starts)
        if s <= q < e
        for k in range(s, q + 1)
    ]
    assert attention_work(starts, intervals) == len(pairs)
    assert attention_work(starts, intervals, 4) == len([1 for q, k in pairs if q - k < 4])


def test_only_what_is_seen_is_exchanged():
    """Short samples stay on their ranks; under a window only the neighbours of a cut travel."""
    group, cpu = None, torch.device("cpu")
    whole = [Deal((0, 4096), 4, rank, group, cpu) for rank in range(4)]
    assert [deal.received_tokens(None) for deal in whole] == [3072, 2560, 2048, 1536]
    assert sum(deal.received_tokens(64) for deal in whole) <= 2 * 4 * 63
    short = [Deal(tuple(range(0, 4097, 16)), 4, rank, group, cpu) for rank in range(4)]
    assert sum(deal.received_tokens(None) for deal in short) == 0


def test_heads_are_exchanged_where_they_divide():
    assert check_heads(8, 4, 2, 2) is None
    assert check_heads(8, 2, 2, 2) == "2 key/value heads do not divide by tp 2 x cp 2"
    assert check_heads(28, 4, 8, 1) == "28 attention heads do not divide by tp 1 x cp 8"


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """On a rank: largest differences of output and gradients from one rank's, and bytes that autograd keeps."""
    dtype, heads, groups, window = case["dtype"], case["heads"], case["groups"], case["window"]
    rank, size = dist.get_rank(), dist.get_world_size()
    starts = case["starts"]
    torch.manual_seed(0)
    total, dim = starts[-1], 16
    q, k, v, weight = (torch.randn(total, n, dim, dtype=dtype) for n in (heads, groups, groups, heads))
    full = [x.clone().requires_grad_() for x in (q, k, v)]
    lengths = [b - a for a, b in pairwise(starts)]
    cu = torch.tensor(starts, dtype=torch.int32)
    wanted = attention(*full, cu, cu, max(lengths), max(lengths), True, window)
    (wanted * weight).sum().backward()
    deal = dataclasses.replace(
        Deal(starts, size, rank, dist.group.WORLD, torch.device("cpu")), exchange=case["exchange"]
    )
    local = [x[deal.index].clone().requires_grad_() for x in (q, k, v)]
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = context_attention(*local, deal, window)
    (out * weight[deal.index]).sum().backward()
    pairs = [(out.detach(), wanted.detach()[deal.index]), *((x.grad, y.grad[deal.index]) for x, y in zip(local, full))]
    largest = max(float(b.abs().max()) for _, b in pairs)
    own = sum(x.untyped_storage().nbytes() for x in local)
    return {
        # A window of one key leaves no true gradient to queries and keys: distances are of the largest gradient.
        "errors": [float((a - b).abs().max()) / largest for a, b in pairs],
        "kept": sum(kept.values()) / own,
    }


ROWS = {"mixed": [5, 37, 120, 3], "tiny": [1] * 7, "long": [1, 5000, 2, 1], "one": [640]}


@pytest.mark.parametrize("size", [2, 4])
def test_attention_equals_one_rank(size):
    cases = []
    for name, lengths in ROWS.items():
        filler = -sum(lengths) % size
        starts = tuple(sum(lengths[:i]) for i in range(len(lengths) + 1)) + ((sum(lengths) + filler,) if filler else ())
        for dtype in (torch.float32, torch.float64) if name != "long" else (torch.float32,):
            for exchange, heads, groups in (("gather", 8, 2), ("gather", 3, 1), ("heads", 8, 4)):
                for window in (None, 1, 16) if name != "long" else (None, 16)[: 1 + (groups == 1)]:
                    cases.append(
                        dict(starts=starts, dtype=dtype, exchange=exchange, heads=heads, groups=groups, window=window)
                    )
    results = run_distributed(compare_all, cases, dp=size)
    for i, case in enumerate(cases):
        worst = max(max(result[i]["errors"]) for result in results)
        assert worst <= CLOSE[case["dtype"]], (case, worst)
        if case["exchange"] == "gather" and case["starts"][-1] > 1000:
            # q, k, v and the output of attention are the rank's own; gathered keys and values would be cp times k and v.
            assert all(result[i]["kept"] <= 1.01 for result in results), [result[i]["kept"] for result in results]


def compare_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [compare(case) for case in cases]


def refuse() -> str:
    deal = Deal((0, 8), 2, dist.get_rank(), dist.group.WORLD, torch.device("cpu"), "heads")
    q, k = torch.randn(4, 3, 8), torch.randn(4, 1, 8)
    with pytest.raises(ConfigError) as caught:
        context_attention(q, k, k, deal)
    return str(caught.value)


def test_heads_that_do_not_divide_are_refused():
    assert "3 attention heads do not divide by tp 1 x cp 2" in run_distributed(refuse, dp=2)[0]
