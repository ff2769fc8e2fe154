"""Adapters in memory: what a pair adds, and the same adapter under other names."""

import torch
from safetensors.torch import load_file

from megatron_vlm.conversion.convert import mg2hf
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.peft.adapter import Adapter, Pair, renamed
from megatron_vlm.testing.twins.internvl3 import write_chat_layout, write_tiny_internvl3
from megatron_vlm.weights.mapping import Mapping, TensorInfo, direct, qkv
from tests.peft.adapter_runs import adapter_of, assert_same, checkpoint, merged


def test_parts_become_one_linear(tmp_path):
    """Pairs of q, k and v (v has none) stack their ranks where the layout has one linear, each with its own rows of B."""
    twin = write_tiny_internvl3(tmp_path / "base")
    write_chat_layout(tmp_path / "chat", twin)
    run = checkpoint(
        tmp_path / "run", tmp_path / "base", target_modules=r".*attention\.(q|k)_proj|.*linear_1", r=4, alpha=8.0
    )
    mg2hf(run, tmp_path / "adapter", adapter_only=True, naming="chat", base=tmp_path / "chat")
    mg2hf(run, tmp_path / "merged", merge=True, naming="chat")
    config, adapter = adapter_of(tmp_path / "adapter")
    name = "vision_model.encoder.layers.0.attn.qkv"
    assert adapter[f"{name}.lora_A.weight"].shape[0] == 8 and not adapter[f"{name}.lora_B.weight"][-48:].any()
    scales = {config["lora_alpha"] / config["r"]}
    scales |= {config["alpha_pattern"][key] / config["rank_pattern"][key] for key in config["alpha_pattern"]}
    assert scales == {2.0}
    base = load_file(tmp_path / "chat" / "model.safetensors")
    expected = merged(base, {"lora_alpha": 2, "r": 1, "rank_pattern": {}, "alpha_pattern": {}}, adapter)
    assert_same(load_file(tmp_path / "merged" / "model.safetensors"), expected)
    # The fused adapter comes in on the model of the other layout, too.
    with open_source(tmp_path / "adapter", base=tmp_path / "base") as fused, open_source(run) as split:
        assert fused.naming == "chat" and split.naming is None
        assert_same({n: fused.read(n) for n in fused.infos}, {n: split.read(n) for n in split.infos})


def test_what_a_pair_adds():
    generator = torch.Generator().manual_seed(0)
    a, b, weight = (torch.randn(shape, generator=generator) for shape in ((4, 6), (8, 4), (8, 6)))
    pair = Pair(a=a, b=b, alpha=8.0)
    assert (pair.r, pair.scaling, Pair(a=a, b=b, alpha=8.0, rslora=True).scaling) == (4, 2.0, 4.0)
    assert torch.equal(pair.merged(weight), weight + 2 * (b @ a))
    assert torch.equal(pair.merged(weight.bfloat16()), (weight.bfloat16().float() + 2 * (b @ a)).bfloat16())


def test_fused_pairs_fall_into_parts_and_come_back():
    heads = dict(num_heads=4, num_query_groups=2)
    apart = Mapping(entries=(qkv("qkv.weight", ["q.weight", "k.weight", "v.weight"], **heads),), vocab_size=0)
    fused = Mapping(entries=(direct("qkv.weight", "wqkv.weight"),), vocab_size=0)
    infos = {"qkv.weight": TensorInfo(dtype=torch.float32, shape=(32, 6))}
    generator = torch.Generator().manual_seed(0)
    pair = Pair(a=torch.randn(3, 6, generator=generator), b=torch.randn(32, 3, generator=generator), alpha=6.0)
    parts = renamed(Adapter(pairs={"wqkv": pair}), fused, apart, infos, lambda name: torch.zeros(32, 6))
    assert parts.pairs.keys() == {"q", "k", "v"} and all(torch.equal(p.a, pair.a) for p in parts.pairs.values())
    zeros = [torch.zeros(rows, 6) for rows in (16, 8, 8)]
    added = [parts.applied(f"{name}.weight", zero) for name, zero in zip("qkv", zeros)]
    assert torch.equal(apart.entries[0].to_full(added), pair.merged(torch.zeros(32, 6)))
    back = renamed(parts, apart, fused, infos, lambda name: torch.zeros(32, 6)).pairs["wqkv"]
    assert back.r == 9  # ranks are stacked
    torch.testing.assert_close(back.merged(torch.zeros(32, 6)), pair.merged(torch.zeros(32, 6)))
