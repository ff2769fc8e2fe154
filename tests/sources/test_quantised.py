"""Which weights of a source are quantised, and that a run and what is stored agree."""

from types import SimpleNamespace

import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.errors import ConfigError
from megatron_vlm.sources.quantised import agree, quantised_names
from megatron_vlm.weights.mapping import TensorInfo
from megatron_vlm.weights.nf4.tensor import Quantization


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


def test_what_is_stored_and_what_is_wanted_agree():
    stored = Quantization(dtype="bf16", double_quant=False, backend="bitsandbytes")
    source, full = SimpleNamespace(quantization=stored), SimpleNamespace(quantization=None)
    assert agree(full, stored, "fp32") is stored and agree(full, None, "fp32") is None
    assert (
        agree(source, None, "bf16") == stored == agree(source, Quantization(dtype="bf16", double_quant=False), "bf16")
    )
    with pytest.raises(ConfigError, match="quantised from bf16, the run computes in fp16"):
        agree(source, None, "fp16")
    with pytest.raises(ConfigError, match="double_quant True against False; set them alike"):
        agree(source, Quantization(dtype="bf16"), "bf16")
