"""The weight map of Gemma 3: every tensor once, round trips bit for bit, what is not built is refused by name."""

import json
import shutil

import pytest
import torch
import transformers

from megatron_vlm import registry
from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.conversion.verify import verify
from megatron_vlm.errors import ConfigError
from megatron_vlm.testing.twins.gemma3 import tiny_config, tiny_tokenizer, write_tiny_gemma3
from megatron_vlm.testing.twins.model_folders import assert_same_model
from megatron_vlm.weights.mapping import REPLICATED

SPEC = registry.get("gemma3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("twin")
    write_tiny_gemma3(made)
    return made


@pytest.mark.parametrize("tie", [False, True])
def test_every_tensor_of_the_hf_model_is_named_once(tie):
    hf = tiny_config(tiny_tokenizer(), tie=tie)
    with torch.device("meta"):
        model = transformers.Gemma3ForConditionalGeneration(hf)
    mapping = SPEC.mapping(SPEC.config(hf.to_dict()))
    found = [mapping.module_name(name) for entry in mapping for name in entry.hf]
    assert sorted(found) == sorted(name for name, _ in model.named_parameters())
    assert {mapping.hf_aliases(name) for name in model.state_dict()} == mapping.hf_names() | set(mapping.hf_tied)


def test_round_trips(folder, tmp_path):
    for tp, pp in ((1, 1), (4, 1), (2, 2)):
        hf2mg(folder, tmp_path / f"mg{tp}{pp}", tp=tp, pp=pp, vocab_multiple=8)
        mg2hf(tmp_path / f"mg{tp}{pp}", tmp_path / f"hf{tp}{pp}")
        assert_same_model(folder, tmp_path / f"hf{tp}{pp}")


def test_verify_runs_transformers_beside(folder, tmp_path):
    hf2mg(folder, tmp_path / "mg", tp=2, pp=2)
    report = verify(folder, tmp_path / "mg", level="full")
    assert report.passed, report.lines


def test_what_runs_whole_and_what_is_cut():
    config = SPEC.config(tiny_config(tiny_tokenizer(), vision=dict(num_attention_heads=3)).to_dict())
    qkv = "vision_model.encoder.layers.0.self_attention.linear_qkv.weight"
    assert SPEC.mapping(config).by_name()[qkv].split.dim == 0
    assert SPEC.mapping(config, tp=2).by_name()[qkv].split == REPLICATED
    with pytest.raises(ConfigError, match=r"8 heads, 4 kv heads and ffn 96: use one of 1, 2, 4, 8$"):
        SPEC.mapping(config, tp=3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gemma2"}, "model_type gemma3, this one has 'gemma2'"),
        ({"mm_tokens_per_image": 8}, "mm_tokens_per_image 8 is no square whose side divides the 6 patches"),
        ({"mm_tokens_per_image": 16}, "mm_tokens_per_image 16 is no square whose side divides the 6 patches"),
        ({"vision_config": {"vision_use_head": True}}, "vision_use_head True is not built"),
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act 'gelu' is not built"),
    ],
)
def test_what_is_not_built_is_refused(folder, change, message):
    content = json.loads((folder / "config.json").read_text())
    for key, value in change.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=message):
        SPEC.config(content)


def test_published_config_is_read():
    """What google/gemma-3-4b-it's config.json says, in the keys of its time: layers by a number, RoPE beside one another."""
    text = {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    config = SPEC.config({"model_type": "gemma3", "text_config": text, "vision_config": vision})
    assert config.text.full_layers == (5, 11, 17, 23, 29)
    assert (config.text.rotary_base, config.text.local_rotary_base) == (1e6, 1e4)
    assert config.text.rope_scaling.factor == 8 and config.text.sliding_window == 1024
    assert (config.text.num_attention_heads, config.text.num_query_groups, config.text.head_dim) == (8, 4, 256)
    assert config.text.tie_word_embeddings and config.text.attention_scale == 1 / 16
    assert (config.pool, config.image_tokens, config.image_token_id) == (4, 256, 262144)
    cost = config.image_cost((3, 896, 896))
    assert (cost.patches, cost.features, cost.connector) == (4096, 256, 2 * 256 * 1152 * 2560)


def test_names_of_a_new_save_are_read(folder, tmp_path):
    """transformers 5 leaves ``vision_model.`` out where it saves a model that was not read with it; exports have it."""
    from safetensors.torch import load_file, save_file

    tensors = {
        n.replace("vision_tower.vision_model.", "vision_tower."): t
        for n, t in load_file(folder / "model.safetensors").items()
    }
    shutil.copytree(folder, tmp_path / "new")
    save_file(tensors, tmp_path / "new" / "model.safetensors", metadata={"format": "pt"})
    mg2hf(tmp_path / "new", tmp_path / "hf")
    assert_same_model(folder, tmp_path / "hf")
