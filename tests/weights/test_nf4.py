"""NF4 against bitsandbytes: codes, scales and values of whole tensors, and of shards in every split. All of it bit for bit."""

import builtins

import bitsandbytes.functional as bnb
import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.errors import ConfigError
from megatron_vlm.sources.quantised import quantised_names
from megatron_vlm.testing import nf4_oracle
from megatron_vlm.testing.nf4_oracle import dequantise
from megatron_vlm.weights import nf4 as nf4_of
from megatron_vlm.weights.mapping import COLUMN, ROW, Entry, Split, TensorInfo, direct, gated, qkv
from megatron_vlm.weights.nf4 import Nf4Tensor, block_values, dynamic_map, quantise
from megatron_vlm.weights.nf4_shard import Lines, shard

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
    monkeypatch.setattr("megatron_vlm.weights.nf4._CHUNK", 640)
    for name, part in quantise(weight, double=True).parts().items():
        assert torch.equal(part, whole.parts()[name]), name


def test_8bit_map_equals_bitsandbytes():
    assert torch.equal(dynamic_map(torch.device("cpu")), bnb.create_dynamic_map())


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


def test_what_is_no_linear_is_refused():
    vocab = Split(dim=0, vocab_multiple=8)
    with pytest.raises(ValueError, match="no linear"):
        Lines.of(direct("head", "head", vocab), [(64, 64)], 1, 0)
    with pytest.raises(ConfigError, match="100 columns do not divide by tensor parallel size 3"):
        Lines.of(direct("w", "w", ROW), [(64, 100)], 3, 0)


def test_values_behind_the_end_are_zero():
    tensor = Nf4Tensor(shape=(3,), codes=torch.tensor([0xF0, 0x0F], dtype=torch.uint8), absmax=torch.ones(1))
    assert dequantise(tensor, torch.float32, block_values).tolist() == [1.0, -1.0, -1.0]
    assert (block_values(tensor.blocks(), tensor.absmax, torch.float32)[0, 4:] == 0).all()


def test_head_embeddings_and_norms_are_never_among_the_names():
    spec = registry.get("internlm2")
    config = spec.config(
        dict(model_type="internlm2", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=64, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=1e4,
             hidden_act="silu", bias=False, tie_word_embeddings=False)
    )  # fmt: skip
    mapping = spec.mapping(config)
    shapes = {entry.name: (8,) if "norm" in entry.name else (8, 8) for entry in mapping}
    infos = {name: TensorInfo(dtype=torch.float32, shape=shape) for name, shape in shapes.items()}
    linears = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    expected = {f"language_model.decoder.layers.{i}.{linear}.weight" for i in range(2) for linear in linears}
    assert quantised_names(mapping, infos, ("llm", "vision")) == expected
    assert quantised_names(mapping, infos, ("vision",)) == set()
