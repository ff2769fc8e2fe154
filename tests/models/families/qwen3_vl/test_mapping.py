"""Qwen3-VL's files: round trips bit for bit through tp and pp, what is refused, verify."""

import json

import pytest
from safetensors.torch import load_file

from megatron_vlm import registry
from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.conversion.verify import verify
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.families.qwen3_vl.config import Qwen3VLConfig
from megatron_vlm.testing.twins.qwen3_vl import write_tiny_qwen3_vl
from tests.models.families.internvl3.test_mapping import assert_same_tensors

SPEC = registry.get("qwen3_vl")
# config.json of Qwen/Qwen3-VL-4B-Instruct, what the model depends on.
PUBLISHED_4B = {
    "model_type": "qwen3_vl",
    "image_token_id": 151655,
    "tie_word_embeddings": True,
    "text_config": {
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "in_channels": 3,
        "intermediate_size": 4096,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2560,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("qwen3_vl")
    write_tiny_qwen3_vl(root / "plain")
    write_tiny_qwen3_vl(root / "tied", tie=True, vision=dict(num_heads=3))
    return root


@pytest.mark.parametrize("name", ["plain", "tied"])
def test_round_trips(folders, tmp_path, name):
    for tp, pp in ((1, 1), (4, 4)):
        hf2mg(folders / name, tmp_path / f"mg{tp}{pp}", tp=tp, pp=pp, vocab_multiple=8)
        mg2hf(tmp_path / f"mg{tp}{pp}", tmp_path / f"hf{tp}{pp}")
        assert_same_tensors(folders / name, tmp_path / f"hf{tp}{pp}")
    assert (
        set(load_file(folders / name / "model.safetensors"))
        == SPEC.mapping(SPEC.config(json.loads((folders / name / "config.json").read_text()))).hf_names()
    )


def test_verify_runs_transformers_beside(folders, tmp_path):
    hf2mg(folders / "plain", tmp_path / "mg", tp=2, pp=2)
    report = verify(folders / "plain", tmp_path / "mg", level="full")
    assert report.passed, report.lines


def test_the_published_config():
    config = Qwen3VLConfig.from_hf(PUBLISHED_4B)
    assert (config.vision.side, config.vision.levels, config.vision.unit) == (48, (5, 11, 17), 32)
    assert config.text.rope_axes == (0, 1, 2) * 20 + (0,) * 4 and config.text.rotary_base == 5e6
    assert (config.text.deepstack, config.text.feature_size, config.text.tie_word_embeddings) == (3, 4 * 2560, True)
    assert SPEC.mapping(config, tp=8).by_name()["connector.levels.2.mlp.linear_fc1.weight"].split.dim == 0


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("", {"model_type": "qwen3_vl_moe"}, "model_type qwen3_vl, this one has 'qwen3_vl_moe'"),
        ("text_config", {"attention_bias": True}, "attention_bias true"),
        ("text_config", {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 16]}}, "must add up to 64"),
        ("text_config", {"num_hidden_layers": 2}, r"\[5, 11, 17\] are more levels than the decoder has layers, 2"),
        ("vision_config", {"hidden_act": "silu"}, "'silu' is not built"),
        ("vision_config", {"num_position_embeddings": 2300}, "2300 must be a square"),
        ("vision_config", {"deepstack_visual_indexes": [11, 5, 17]}, r"\[11, 5, 17\] must be layers of 24, in order"),
        ("vision_config", {"deepstack_visual_indexes": [5, 24]}, r"\[5, 24\] must be layers of 24"),
    ],
)  # fmt: skip
def test_what_is_not_built_is_refused(part, change, message):
    content = json.loads(json.dumps(PUBLISHED_4B))
    (content[part] if part else content).update(change)
    with pytest.raises(ConfigError, match=message):
        SPEC.config(content)
