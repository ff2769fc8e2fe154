"""InternVL's two layouts: every tensor named once, each exports to the other, round trips through tp and pp, equal logits."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlm import registry
from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.conversion.verify import verify
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.families.internvl3.processor import InternVL3Processor
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import layout_logits
from megatron_vlm.testing.twins.internvl3 import (
    make_samples,
    write_chat_layout,
    write_tiny_internvl2,
    write_tiny_internvl3,
)
from megatron_vlm.weights.mapping import REPLICATED

SPEC = registry.get("internvl3")
TWINS = {
    "300m": {},
    "3_5_38b": dict(
        vision=dict(num_attention_heads=3, attention_bias=False, use_qk_norm=True, norm_type="rms_norm"),
        text=dict(model_type="qwen3", head_dim=12),
    ),
    "tied": dict(tie=True),
    "internlm2": None,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> folders of the same weights in transformers' layout and in the original's."""
    made = {}

    def make(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            if name == "internlm2":
                write_tiny_internvl2(root / "both")
                root = root / "both"
            else:
                write_chat_layout(root / "chat", write_tiny_internvl3(root / "hf", **TWINS[name]))
            made[name] = {"hf": root / "hf", "chat": root / "chat"}
        return made[name]

    return make


def tensors(folder):
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def assert_same_tensors(one, other):
    one, other = tensors(one), tensors(other)
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("name", TWINS)
def test_each_layout_exports_to_the_other(folders, tmp_path, name):
    both = folders(name)
    for own, other in (("hf", "chat"), ("chat", "hf")):
        mg2hf(both[own], tmp_path / own, naming=other)
        written = tensors(tmp_path / own)
        wanted = tensors(both[other])
        if name == "internlm2" and other == "chat":  # it says Llama, and stays one
            assert SPEC.config(json.loads((tmp_path / own / "config.json").read_text())).text.model_type == "llama"
            mg2hf(tmp_path / own, tmp_path / "again", naming="hf")
            assert_same_tensors(tmp_path / "again", both[own])
            continue
        if name == "tied":  # the twin in the original's layout stores the head, transformers' does not
            wanted = {n: t for n, t in wanted.items() if n in written}
            assert set(tensors(both[other])) - set(written) <= {"language_model.lm_head.weight"}
        assert set(written) == set(wanted)
        for tensor_name, tensor in wanted.items():
            assert torch.equal(tensor, written[tensor_name]), tensor_name
        # What was written says the same of model and images as the twin made by hand.
        theirs, ours = (SPEC.config(json.loads((f / "config.json").read_text())) for f in (both[other], tmp_path / own))
        assert ours.replace(text=theirs.text) == theirs
        but = {} if name == "internlm2" else {"rope_scaling": None}
        assert ours.text.replace(**but) == theirs.text.replace(**but)
        settings = DataConfig(seq_length=512)
        ours, theirs = (InternVL3Processor.from_pretrained(f, settings) for f in (tmp_path / own, both[other]))
        for field in (
            "side",
            "min_tiles",
            "max_tiles",
            "thumbnail",
            "resample",
            "mean",
            "std",
            "stop_ids",
            "tile_tokens",
            "template",
            "bos_token_id",
        ):
            assert getattr(ours, field) == getattr(theirs, field), field


def test_own_layout_by_name_is_a_plain_copy(folders, tmp_path):
    both = folders("300m")
    mg2hf(both["chat"], tmp_path / "out", naming="chat")
    assert_same_tensors(both["chat"], tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (both["chat"] / "config.json").read_text()
    )
    with pytest.raises(ConfigError, match=r"--as llama.*chat, hf"):
        mg2hf(both["chat"], tmp_path / "other", naming="llama")


@pytest.mark.parametrize(
    "name, layout",
    [(name, layout) for name in ("300m", "3_5_38b") for layout in ("hf", "chat")] + [("internlm2", "chat")],
)
def test_round_trips(folders, tmp_path, name, layout):
    folder = folders(name)[layout]
    for tp, pp in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)):
        hf2mg(folder, tmp_path / f"mg{tp}{pp}", tp=tp, pp=pp, vocab_multiple=8)
        mg2hf(tmp_path / f"mg{tp}{pp}", tmp_path / f"hf{tp}{pp}")
        assert_same_tensors(folder, tmp_path / f"hf{tp}{pp}")
        file = "tokenizer.model" if name == "internlm2" else "tokenizer.json"
        assert (tmp_path / f"hf{tp}{pp}" / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize("name", ["300m", "3_5_38b", "internlm2"])
def test_equal_logits_of_both_layouts(folders, name):
    both = folders(name)
    config = SPEC.config(json.loads((both["hf"] / "config.json").read_text()))
    row = row_from_samples(make_samples(config, [([2], 9), ([], 5)]))
    results = [run_distributed(layout_logits, str(both[layout]), [row], {}, {})[0] for layout in ("hf", "chat")]
    assert torch.equal(results[0]["logits"][0], results[1]["logits"][0])


def test_towers_that_do_not_divide_are_replicated(folders):
    config = SPEC.config(json.loads((folders("3_5_38b")["hf"] / "config.json").read_text()))
    name = "vision_model.encoder.layers.0.self_attention.q_layernorm.weight"
    assert SPEC.mapping(config).by_name()[name].split.dim == 0
    assert SPEC.mapping(config, tp=2).by_name()[name].split == REPLICATED
    with pytest.raises(ConfigError, match="use one of 1, 2, 4, 8"):
        SPEC.mapping(config, tp=3)


def test_verify_runs_transformers_beside(folders, tmp_path):
    both = folders("3_5_38b")
    hf2mg(both["hf"], tmp_path / "mg", tp=2, pp=2)
    report = verify(both["hf"], tmp_path / "mg", level="full")
    assert report.passed, report.lines
    assert verify(both["chat"], both["chat"]).level == "weights"
    with pytest.raises(ConfigError, match="--level weights"):
        verify(both["chat"], both["chat"], level="forward")


@pytest.mark.parametrize(
    "layout, change, message",
    [
        ("chat", {"ps_version": "v1"}, "ps_version 'v1'"),
        ("chat", {"select_layer": -4}, "select_layer -4"),
        ("chat", {"use_llm_lora": 16}, "use_llm_lora 16"),
        ("chat", {"llm_config": {"model_type": "phi3"}}, "'phi3' is not built for InternVL: one of qwen2, qwen3"),
        ("chat", {"llm_config": {"model_type": "qwen3_moe"}}, "'qwen3_moe' is not built"),
        ("chat", {"llm_config": {"model_type": "qwen3", "use_sliding_window": True}}, "use_sliding_window true"),
        ("chat", {"vision_config": {"hidden_act": "quick_gelu"}}, "quick_gelu"),
        ("hf", {"vision_feature_layer": -2}, "vision_feature_layer -2"),
        ("hf", {"projector_hidden_act": "relu"}, "relu"),
        ("hf", {"vision_config": {"use_mean_pooling": False}}, "use_mean_pooling False"),
        ("hf", {"downsample_ratio": 0.3}, "downsample_ratio 0.3"),
        ("hf", {"model_type": "idefics2"}, "internvl_chat or internvl"),
    ],
)
def test_what_is_not_built_is_refused(folders, layout, change, message):
    content = json.loads((folders("300m")[layout] / "config.json").read_text())
    for key, value in change.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ConfigError, match=message):
        SPEC.config(content)
