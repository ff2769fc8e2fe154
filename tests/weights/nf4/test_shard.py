"""Shards of weights in NF4: at any tp, the values are those of the whole tensor in bitsandbytes, bit for bit."""

import bitsandbytes.functional as bnb
import pytest
import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.weights.mapping import COLUMN, ROW, Entry, Split, direct, gated, qkv
from megatron_vlm.weights.nf4.shard import Lines, shard
from megatron_vlm.weights.nf4.tensor import quantise


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    weight = 0.15 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    weight.view(-1)[64:128] = 0  # a block of zeros, where there are two
    return weight


def reference(weight: torch.Tensor, double: bool) -> tuple[torch.Tensor, bnb.QuantState, torch.Tensor]:
    """bitsandbytes' codes, state and values; whole blocks are given to it as rows, or its AVX-512 kernel restarts them."""
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    if weight.numel() % 64 == 0:
        state.shape = torch.Size((weight.numel() // 64, 64))
    return codes, state, bnb.dequantize_4bit(codes, state).view(weight.shape)


HEADS = dict(num_heads=8, num_query_groups=4)
ENTRIES: dict[str, tuple[Entry, list[tuple[int, int]]]] = {
    "column": (direct("w", "w", COLUMN), [(256, 128)]),
    "row": (direct("w", "w", ROW), [(96, 512)]),
    "row, 4304 wide": (direct("w", "w", ROW), [(48, 4304)]),
    "row, 1152 wide": (direct("w", "w", ROW), [(36, 1152)]),  # 288 over 4 ranks
    "column, odd": (direct("w", "w", COLUMN), [(48, 100)]),
    "whole, odd": (direct("w", "w"), [(37, 100)]),
    "qkv": (qkv("w", "qkv", **HEADS), [(128, 128), (64, 128), (64, 128)]),
    "qkv, odd": (qkv("w", "qkv", **HEADS), [(48, 100), (24, 100), (24, 100)]),
    "gated": (gated("w", ["gate", "up"]), [(344, 128)] * 2),
    "gated, odd": (gated("w", ["gate", "up"]), [(344, 72)] * 2),
    "many groups": (gated("w", ["gate", "up"]), [(320, 256)] * 2),  # 5 groups of 256 blocks in each HF tensor
}


@pytest.mark.parametrize("name", ENTRIES)
def test_shards_equal_the_whole_tensor(name):
    """At tp 1, 2 and 4: what a rank dequantises is its part of what bitsandbytes makes of each unsharded HF tensor."""
    entry, shapes = ENTRIES[name]
    weights = [draw(*shape, seed=number).bfloat16() for number, shape in enumerate(shapes)]
    for double in (False, True):
        full = entry.to_full([reference(weight, double)[2] for weight in weights])
        tensors = [quantise(weight, double=double) for weight in weights]
        for tp in (1, 2, 4):
            for rank in range(tp):
                lines = Lines.of(entry, shapes, tp, rank)
                codes, nf4 = shard(lines, iter(tensors), torch.bfloat16)
                expected = entry.split.shard(full, tp, rank)
                assert torch.equal(nf4.values(codes), expected), (double, tp, rank)
                if "odd" not in name and "wide" not in name:
                    assert codes.numel() * 2 == expected.numel()


def test_bits_per_parameter():
    entry, shape = direct("w", "w", ROW), (1024, 4096)
    weight = draw(*shape).bfloat16()
    # A shard also holds the scales of all groups, and where each of its lines lies among them.
    for double, whole, half in ((False, 4.5, 4.5), (True, 4.127, 4.148)):
        tensor = quantise(weight, double=double)
        assert bits(tensor.parts().values(), weight.numel()) == pytest.approx(whole, abs=1e-3)
        codes, nf4 = shard(Lines.of(entry, [shape], 2, 1), [tensor], torch.bfloat16)
        assert bits([codes, *nf4.buffers()], weight.numel() // 2) == pytest.approx(half, abs=1e-3)


def bits(tensors, count: int) -> float:
    return 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors) / count


def test_what_is_no_linear_is_refused():
    vocab = Split(dim=0, vocab_multiple=8)
    with pytest.raises(ValueError, match="no linear"):
        Lines.of(direct("head", "head", vocab), [(64, 64)], 1, 0)
    with pytest.raises(ConfigError, match="100 columns do not divide by tensor parallel size 3"):
        Lines.of(direct("w", "w", ROW), [(64, 100)], 3, 0)
