"""NF4 against bitsandbytes: codes, scales and values of whole tensors, and of shards in every split. All of it bit for bit."""

import builtins

import bitsandbytes.functional as bnb
import pytest
import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.testing import nf4_oracle
from megatron_vlm.testing.nf4_oracle import dequantise
from megatron_vlm.weights.nf4 import tensor as nf4_of
from megatron_vlm.weights.nf4.tensor import Nf4Tensor, block_values, dynamic_map, quantise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Multiples of 64 values or of rows of 64, and neither: 4304 columns, 54 and 70 values in all, a last block of 6.
SHAPES = [(64, 64), (24, 4304), (96, 160), (300, 130), (9, 6), (7, 10), (1024, 1100)]


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


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("by", [nf4_of, nf4_oracle], ids=["ours", "oracle"])
def test_whole_tensors_equal_bitsandbytes(by, double):
    for number, shape in enumerate(SHAPES):
        for dtype in DTYPES:
            weight = draw(*shape, seed=number).to(dtype)
            codes, state, values = reference(weight, double)
            ours = by.quantise(weight, double=double)
            assert torch.equal(ours.codes, codes.view(-1)), (shape, dtype)
            assert torch.equal(ours.absmax, state.absmax), (shape, dtype)
            if double:
                assert torch.equal(ours.scales, state.state2.absmax) and torch.equal(ours.offset[0], state.offset)
            assert torch.equal(dequantise(ours, dtype, by.block_values), values), (shape, dtype)
            error = float((values.float() - weight.float()).norm() / weight.float().norm())
            assert 0.06 < error < 0.12, f"{shape}: {error} is not the error of NF4"


def test_a_large_tensor_is_quantised_in_pieces_and_stays_the_same(monkeypatch):
    weight = draw(150, 130).bfloat16()
    whole = quantise(weight, double=True)
    monkeypatch.setattr("megatron_vlm.weights.nf4.tensor._CHUNK", 640)
    for name, part in quantise(weight, double=True).parts().items():
        assert torch.equal(part, whole.parts()[name]), name


def test_8bit_map_equals_bitsandbytes():
    assert torch.equal(dynamic_map(torch.device("cpu")), bnb.create_dynamic_map())


def test_scales_of_a_shard_quantised_by_itself_would_differ():
    """Why whole tensors are quantised: the mean and the groups of double quantisation belong to the whole."""
    weight = draw(256, 128)
    whole = dequantise(quantise(weight, double=True), torch.float32, block_values)
    half = dequantise(quantise(weight[128:].contiguous(), double=True), torch.float32, block_values)
    assert not torch.equal(half, whole[128:])


def test_its_absence_is_an_error_that_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("bitsandbytes"):
            raise ImportError("No module named 'bitsandbytes'")
        return real(name, *args, **kwargs)

    nf4_of._library.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    for use in (
        lambda: quantise(draw(8, 8), double=False),
        lambda: block_values(codes, torch.ones(1), torch.float32),
    ):
        with pytest.raises(
            ConfigError, match=r"does not run on cpu \(ImportError: .*pip install 'megatron_vlm\[qlora\]'"
        ):
            use()


def test_values_behind_the_end_are_zero():
    tensor = Nf4Tensor(shape=(3,), codes=torch.tensor([0xF0, 0x0F], dtype=torch.uint8), absmax=torch.ones(1))
    assert dequantise(tensor, torch.float32, block_values).tolist() == [1.0, -1.0, -1.0]
    assert (block_values(tensor.blocks(), tensor.absmax, torch.float32)[0, 4:] == 0).all()
