"""Qwen2.5-VL's files: round trips bit for bit through tp and pp, three spellings of names, what is refused, verify."""

import json

import pytest
from safetensors.torch import load_file, save_file

from megatron_vlm import registry
from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.conversion.verify import verify
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.families.qwen2_5_vl.config import Qwen25VLConfig
from megatron_vlm.testing.twins.qwen2_5_vl import write_tiny_qwen2_5_vl
from megatron_vlm.weights.mapping import REPLICATED
from tests.models.families.internvl3.test_mapping import assert_same_tensors, tensors

SPEC = registry.get("qwen2_5_vl")
# config.json of Qwen/Qwen2.5-VL-7B-Instruct, what the model depends on: flat, as published.
PUBLISHED_7B = {
    "model_type": "qwen2_5_vl",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "image_token_id": 151655,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
    "vision_config": {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 1280,
        "in_chans": 3,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("qwen2_5_vl")
    write_tiny_qwen2_5_vl(root / "plain")
    write_tiny_qwen2_5_vl(root / "tied", tie=True, vision=dict(num_heads=3))
    return root


@pytest.mark.parametrize("name", ["plain", "tied"])
def test_round_trips(folders, tmp_path, name):
    for tp, pp in ((1, 1), (4, 2)):
        hf2mg(folders / name, tmp_path / f"mg{tp}{pp}", tp=tp, pp=pp, vocab_multiple=8)
        mg2hf(tmp_path / f"mg{tp}{pp}", tmp_path / f"hf{tp}{pp}")
        assert_same_tensors(folders / name, tmp_path / f"hf{tp}{pp}")
        for file in ("tokenizer.json", "preprocessor_config.json", "chat_template.jinja"):
            assert (tmp_path / f"hf{tp}{pp}" / file).read_bytes() == (folders / name / file).read_bytes()


def test_names_as_transformers_has_them_in_memory_are_read(folders, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    names = {"model.": "model.language_model.", "visual.": "model.visual."}
    found = tensors(folders / "plain")
    for path in (folders / "plain").iterdir():
        if path.suffix != ".safetensors":
            (other / path.name).write_bytes(path.read_bytes())
    renamed = {
        next((new + n[len(old) :] for old, new in names.items() if n.startswith(old)), n): t for n, t in found.items()
    }
    assert not set(renamed) & set(found) - {"lm_head.weight"}
    save_file(renamed, other / "model.safetensors", {"format": "pt"})
    mg2hf(other, tmp_path / "out")
    assert_same_tensors(folders / "plain", tmp_path / "out")


def test_verify_runs_transformers_beside(folders, tmp_path):
    hf2mg(folders / "plain", tmp_path / "mg", tp=2, pp=2)
    report = verify(folders / "plain", tmp_path / "mg", level="full")
    assert report.passed, report.lines


def test_the_published_config():
    config = Qwen25VLConfig.from_hf(PUBLISHED_7B)
    assert (config.vision.window, config.vision.full_layers, config.vision.unit) == (4, (7, 15, 23, 31), 28)
    assert config.text.rope_axes == (0,) * 16 + (1,) * 24 + (2,) * 24 and config.text.rope_scaling is None
    by_name = SPEC.mapping(config, tp=4).by_name()
    assert by_name["vision_model.encoder.layers.0.mlp.linear_fc1.weight"].split.stride == 2
    whole = SPEC.mapping(config.replace(text=config.text.replace(num_attention_heads=32, num_query_groups=8)), tp=8)
    assert whole.by_name()["vision_model.encoder.layers.0.mlp.linear_fc1.weight"].split == REPLICATED  # 3420 / 8
    with pytest.raises(ConfigError, match="use one of 1, 2, 4"):
        SPEC.mapping(config, tp=8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "qwen2_vl"}, "model_type qwen2_5_vl, this one has 'qwen2_vl'"),
        ({"use_sliding_window": True}, "use_sliding_window true"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 16]}}, r"\[16, 24, 16\] must add up to 64"),
        ({"vision_config": {"hidden_act": "gelu"}}, "'gelu' is not built"),
        ({"vision_config": {"out_hidden_size": 2048}}, "out_hidden_size 2048"),
        ({"vision_config": {"window_size": 100}}, "window_size 100 must be a multiple of 28"),
    ],
)
def test_what_is_not_built_is_refused(change, message):
    content = {key: {**value, **change[key]} if key == "vision_config" and key in change else change.get(key, value)
               for key, value in PUBLISHED_7B.items()}  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        SPEC.config(json.loads(json.dumps(content)))


def test_the_twin_is_of_the_files_that_transformers_writes(folders):
    assert (
        set(load_file(folders / "plain" / "model.safetensors"))
        == SPEC.mapping(SPEC.config(json.loads((folders / "plain" / "config.json").read_text()))).hf_names()
    )
