"""Positions stretched by a setting: what config.json then says, and that transformers computes the same from it."""

import json
import os

import pytest

from megatron_vlm import registry
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.errors import ConfigError
from megatron_vlm.layers.rope import RopeScaling
from megatron_vlm.models.rope_scaling import scaled_config
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import hf_reference, layout_logits, random_samples
from megatron_vlm.testing.shapes import published
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2

TRAINED, LENGTHS = 60, [150, 40]
SETTINGS = {
    "linear": RopeScaling(rope_type="linear", factor=3.0),
    "dynamic": RopeScaling(rope_type="dynamic", factor=2.0),
    "yarn": RopeScaling(rope_type="yarn"),
    "yarn, all of it": RopeScaling(
        rope_type="yarn", factor=4.0, beta_fast=6.0, beta_slow=0.5, mscale=1.0, mscale_all_dim=0.7, truncate=False
    ),
    "llama3": RopeScaling(rope_type="llama3", factor=8.0, high_freq_factor=5.0),
}
BAR = 1e-5
"""Of the largest logit; measured 1.3e-6. Without the scaling 0.2 and more."""


def all_logits(directories, row):
    return [layout_logits(directory, [row], {}, {})["logits"][0] for directory in directories]


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rope") / "plain"
    write_tiny_idefics2(
        directory, text="llama", max_positions=TRAINED, rope={"rope_type": "default", "rope_theta": 500.0}
    )
    return directory


def test_transformers_computes_the_same_from_what_is_written(twin):
    from transformers import Idefics2ForConditionalGeneration

    hf_config = json.loads((twin / "config.json").read_text())
    config = registry.get("idefics2").read_config(hf_config, twin)
    samples = random_samples(config, [([], length) for length in LENGTHS])
    folders, theirs = [], []
    for name, setting in SETTINGS.items():
        folder = twin.parent / name.replace(" ", "_")
        folder.mkdir()
        for file in twin.iterdir():
            os.symlink(file, folder / file.name)
        (folder / "config.json").unlink()
        scaled = scaled_config(hf_config, config.text, setting, sum(LENGTHS))
        (folder / "config.json").write_text(json.dumps(scaled))
        text = registry.get("idefics2").read_config(scaled, folder).text
        assert scaled_config(scaled, text, setting, 150) is scaled  # a run that goes on says it again
        model = Idefics2ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
        folders.append(str(folder))
        theirs.append(hf_reference(model, samples, gradients=False)[1])
    (ours,) = run_distributed(all_logits, [str(twin), *folders], row_from_samples(samples))
    for name, expected, found in zip(SETTINGS, theirs, ours[1:]):
        largest = float(expected.abs().max())
        assert float((found - expected).abs().max()) < BAR * largest, name
        assert float((ours[0] - expected).abs().max()) > 1e3 * BAR * largest, name


def text_config(positions=4096, scaling=None):
    from megatron_vlm.models.parts.decoder import TextConfig

    return TextConfig(
        model_type="llama", hidden_size=64, ffn_hidden_size=96, num_layers=2, num_attention_heads=8, num_query_groups=4,
        head_dim=8, vocab_size=100, max_position_embeddings=positions, norm_epsilon=1e-5, rotary_base=1e4,
        rope_scaling=scaling,
    )  # fmt: skip


def test_a_factor_is_made_for_the_rows():
    scaled = scaled_config(
        {"text_config": {"rope_parameters": {}}}, text_config(), RopeScaling(rope_type="yarn"), 10000
    )
    text = scaled["text_config"]
    assert text["rope_scaling"] == {
        "rope_type": "yarn", "type": "yarn", "factor": 3.0, "original_max_position_embeddings": 4096,
    }  # fmt: skip
    assert text["max_position_embeddings"] == 12288 and "rope_parameters" not in text


@pytest.mark.parametrize("where", ["llm_config", "text_config"])
def test_the_decoder_has_a_section(where):
    hf = {"llm_config": {"hidden_act": "silu"}} if where == "llm_config" else {}
    assert scaled_config(hf, text_config(), RopeScaling(rope_type="linear", factor=2), 8)[where]["rope_theta"] == 1e4
    assert hf in ({}, {"llm_config": {"hidden_act": "silu"}})  # not changed in place


def test_a_text_model_has_it_at_the_top_and_its_own_code_wants_two_keys():
    scaled = scaled_config({"num_hidden_layers": 2}, text_config(), RopeScaling(rope_type="dynamic", factor=4), 9999)
    assert scaled["rope_scaling"] == {"type": "dynamic", "factor": 4.0} and scaled["max_position_embeddings"] == 4096


def test_a_longer_row_stretches_what_was_stretched():
    yarn = RopeScaling(rope_type="yarn", factor=2.0, original_max_position_embeddings=4096)
    scaled = scaled_config({}, text_config(positions=8192, scaling=yarn), RopeScaling(rope_type="yarn"), 32768)
    assert scaled["text_config"]["rope_scaling"]["factor"] == 8.0
    linear = text_config(positions=8192, scaling=RopeScaling(rope_type="linear", factor=2.0))
    with pytest.raises(
        ConfigError, match=r"scaled already .*set model\.rope_scaling\.original_max_position_embeddings"
    ):
        scaled_config({}, linear, RopeScaling(rope_type="yarn"), 32768)
    known = RopeScaling(rope_type="yarn", original_max_position_embeddings=4096)
    assert scaled_config({}, linear, known, 32768)["text_config"]["rope_scaling"]["factor"] == 8.0


def test_a_setting_without_effect_is_refused():
    with pytest.raises(ConfigError, match=r"no effect: data\.seq_length 4096 is within the 4096 positions"):
        scaled_config({}, text_config(), RopeScaling(rope_type="yarn"), 4096)
    with pytest.raises(ConfigError, match="beta_fast has no effect on RoPE scaled by linear"):
        RopeScaling(rope_type="linear", factor=2.0, beta_fast=3.0)
    with pytest.raises(ConfigError, match=r"unknown config key 'model\.rope_scaling\.typ'"):
        RopeScaling.from_dict({"typ": "yarn"}, "model.rope_scaling")


def test_a_run_says_it_in_its_checkpoints_and_exports(twin, tmp_path, caplog):
    """On context parallel ranks; the next run goes on alone without the setting, an answer is longer than the positions."""
    from megatron_vlm.conversion.convert import mg2hf
    from megatron_vlm.testing.runs import train, write_shards
    from megatron_vlm.training.answering.generate import GenerateConfig, run_generate

    data, written = write_shards(tmp_path / "data", 8, 0), {"factor": 4.0, "original_max_position_embeddings": TRAINED}
    save = {name: tmp_path / name for name in ("full", "adapters")}
    words = (
        f"--data-path {data} --seq-length 240 --packing --global-batch-size 1 --lr 1e-3 --device cpu --no-tensorboard "
    )
    words += "--shortest-edge 24 --num-workers 0 --answer-loss-only"
    on_two = f"--context-parallel-size 2 --load {twin} --train-iters 1"

    def run(more, name, cp=1):
        argv = f"{words} {more} --save {save[name]}".split()
        return run_distributed(train, argv, cp=cp)

    ((_, refused),) = run(f"--load {twin} --train-iters 1", "full")
    assert f"above the model's max_position_embeddings {TRAINED}" in refused and "--rope-scaling yarn" in refused
    assert run(f"{on_two} --rope-scaling yarn", "full", cp=2) == [(0, "")] * 2
    assert run(f"--load {save['full']} --train-iters 2", "full") == [(0, "")]
    assert run(f"{on_two} --rope-scaling yarn peft.target_modules=[q_proj] peft.r=2", "adapters", cp=2) == [(0, "")] * 2
    for name, folder in save.items():
        mg2hf(folder, tmp_path / f"{name}_hf", merge=name == "adapters")
        text = json.loads((tmp_path / f"{name}_hf" / "config.json").read_text())["text_config"]
        assert text["rope_scaling"].items() >= written.items() and text["max_position_embeddings"] == 4 * TRAINED
    mg2hf(save["adapters"], tmp_path / "adapter", adapter_only=True)
    assert f'"original_max_position_embeddings": {TRAINED}' in caplog.text and "240 positions" in caplog.text
    asked = {"prompt": {"text": "what is one and two and three? " * 10}, "sampling": {"max_new_tokens": 3}}
    config = GenerateConfig.from_dict({"load": str(save["full"]), "device": "cpu", **asked})
    assert run_distributed(run_generate, config) == [1]


def test_layers_with_a_rope_of_their_own_are_refused():
    text = published()["Gemma3-4B"][1].text
    with pytest.raises(ConfigError, match="not built for a decoder whose layers with and without a window"):
        scaled_config({}, text, SETTINGS["linear"], 8192)
