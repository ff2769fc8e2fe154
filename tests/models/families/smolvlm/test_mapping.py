"""The weight map of Idefics3 and SmolVLM: every tensor once, round trips bit for bit, what is not built is refused by name."""

import json

import pytest
import torch
import transformers

from megatron_vlm import registry
from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.conversion.verify import verify
from megatron_vlm.errors import ConfigError
from megatron_vlm.testing.twins.model_folders import assert_same_model
from megatron_vlm.testing.twins.smolvlm import tiny_config, tiny_tokenizer, write_tiny_smolvlm
from megatron_vlm.weights.mapping import REPLICATED, ROW

SPEC = registry.get("smolvlm")
KINDS = ("SmolVLM", "Idefics3")
LINEAR = "connector.modality_projection.linear.weight"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in made.items():
        write_tiny_smolvlm(folder, kind)
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", [False, True])
def test_every_tensor_of_the_hf_model_is_named_once(tokenizer, kind, tie):
    hf = tiny_config(tokenizer, kind, tie=tie)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(hf)
    mapping = SPEC.mapping(SPEC.config(hf.to_dict()))
    assert mapping.hf_names() == {name for name, _ in model.named_parameters()}
    assert set(mapping.hf_tied) == (set(model.state_dict()) - mapping.hf_names())


@pytest.mark.parametrize("kind", KINDS)
def test_round_trips(folders, tmp_path, kind):
    for tp, pp in ((1, 1), (4, 1), (2, 2)):
        hf2mg(folders[kind], tmp_path / f"mg{tp}{pp}", tp=tp, pp=pp, vocab_multiple=8)
        mg2hf(tmp_path / f"mg{tp}{pp}", tmp_path / f"hf{tp}{pp}")
        assert_same_model(folders[kind], tmp_path / f"hf{tp}{pp}")


def test_verify_runs_transformers_beside(folders, tmp_path):
    hf2mg(folders["SmolVLM"], tmp_path / "mg", tp=2, pp=2)
    report = verify(folders["SmolVLM"], tmp_path / "mg", level="full")
    assert report.passed, report.lines


def test_what_runs_whole_and_what_is_cut(tokenizer):
    config = SPEC.config(tiny_config(tokenizer, vision=dict(num_attention_heads=3)).to_dict())
    qkv = "vision_model.encoder.layers.0.self_attention.linear_qkv.weight"
    assert SPEC.mapping(config).by_name()[qkv].split.dim == 0
    assert SPEC.mapping(config, tp=2).by_name()[qkv].split == REPLICATED
    assert SPEC.mapping(config, tp=2).by_name()[LINEAR].split == ROW  # the connector does not depend on heads
    with pytest.raises(ConfigError, match=r"8 heads, 4 kv heads and ffn 96: use one of 1, 2, 4, 8$"):
        SPEC.mapping(config, tp=3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "idefics2"}, "model_type must be idefics3 or smolvlm, this one has 'idefics2'"),
        ({"scale_factor": 4}, "scale_factor 4 does not divide the 6 patches of a side"),
        ({"text_config": {"model_type": "gemma"}}, "the text model must be one of .*'gemma'"),
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act 'gelu' is not built"),
    ],
)
def test_what_is_not_built_is_refused(folders, change, message):
    content = json.loads((folders["SmolVLM"] / "config.json").read_text())
    for key, value in change.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=message):
        SPEC.config(content)


def test_sizes_of_a_tile():
    """The three published shapes: patches and tokens of a tile as the hub's processors count them."""
    sizes = {"256m": (512, 16, 4, 64), "2.2b": (384, 14, 3, 81), "8b": (364, 14, 2, 169)}
    for image_size, patch_size, shuffle, tokens in sizes.values():
        hf = transformers.SmolVLMConfig(
            vision_config=dict(image_size=image_size, patch_size=patch_size), scale_factor=shuffle
        )
        config = SPEC.config(hf.to_dict())
        cost = config.image_cost((3, image_size, image_size))
        assert (config.tile_tokens, cost.features) == (tokens, tokens)
        assert cost.patches == (image_size // patch_size) ** 2 == cost.segments[0]
        assert cost.connector == 2 * tokens * config.vision.hidden_size * shuffle**2 * config.text.hidden_size
