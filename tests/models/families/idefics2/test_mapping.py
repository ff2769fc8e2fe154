"""Idefics2's weight map names every tensor of HF's model once, for every tensor parallel size that is legal."""

import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.errors import ConfigError
from megatron_vlm.testing.twins.idefics2 import tiny_idefics2_config, tiny_tokenizer
from megatron_vlm.weights.mapping import REPLICATED

SPEC = registry.get("idefics2")
VISION_QKV = "vision_model.encoder.layers.0.self_attention.linear_qkv.weight"
PERCEIVER_Q = "connector.perceiver_resampler.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def make(tokenizer, text="mistral", **options):
    hf = tiny_idefics2_config(tokenizer, text, **options)
    return hf, SPEC.config(hf.to_dict())


@pytest.mark.parametrize("text, tie", [("mistral", False), ("llama", False), ("llama", True)])
def test_every_tensor_of_the_hf_model_is_named_once(tokenizer, text, tie):
    from transformers import Idefics2ForConditionalGeneration

    hf, config = make(tokenizer, text, tie=tie)
    with torch.device("meta"):
        model = Idefics2ForConditionalGeneration(hf)
    mapping = SPEC.mapping(config)
    assert mapping.hf_names() == {name for name, _ in model.named_parameters()}
    assert set(mapping.hf_tied) == (set(model.state_dict()) - mapping.hf_names())
    assert mapping.vocab_size == hf.text_config.vocab_size


@pytest.mark.parametrize("tp", [3, 5, 6, 7, 16])
def test_illegal_sizes_name_the_legal_ones(tokenizer, tp):
    _, config = make(tokenizer)  # 8 heads, 4 kv heads, ffn 96
    with pytest.raises(ConfigError, match=rf"size {tp} .*8 heads, 4 kv heads and ffn 96: use one of 1, 2, 4, 8$"):
        SPEC.mapping(config, tp=tp)


def test_kv_heads_that_neither_divide_nor_are_divided(tokenizer):
    _, config = make(tokenizer, heads=12, kv_heads=6, text_hidden=48)
    assert SPEC.mapping(config, tp=6) and SPEC.mapping(config, tp=12)
    with pytest.raises(ConfigError, match="use one of 1, 2, 3, 6, 12"):
        SPEC.mapping(config, tp=4)


def test_towers_that_do_not_divide_are_replicated(tokenizer):
    _, config = make(tokenizer, vision_heads=3, perceiver_heads=5, perceiver_kv_heads=5)
    split = SPEC.mapping(config).by_name()
    whole = SPEC.mapping(config, tp=2).by_name()
    for name in (VISION_QKV, PERCEIVER_Q):
        assert split[name].split.dim == 0
        assert whole[name].split == REPLICATED
    # The connector's MLPs do not depend on heads.
    assert whole["connector.modality_projection.linear_fc1.weight"].split.stride == 2
