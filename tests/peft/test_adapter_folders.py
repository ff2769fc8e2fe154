"""XTuner's folders of adapters, one for each part of the model, out and in."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlm.cli.convert import main
from megatron_vlm.conversion.convert import mg2hf
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.testing.twins.llava_internlm2 import write_tiny_llava_internlm2
from tests.peft.adapter_runs import adapter_of, assert_same, checkpoint, merged

XTUNER: dict[str, dict[str, Any]] = {
    "split names": dict(
        target_modules="all-linear", exclude_modules=("linear_1", "linear_2"), modules_to_save=("multi_modal_projector",)
    ),
    "xtuner's names": dict(
        target_modules=("wqkv", "wo", "w1", "w2", "w3", "output", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        modules_to_save=("projector",), names="xtuner", vision_r=2, vision_alpha=4.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", XTUNER)
def test_xtuner_folders(case, tmp_path):
    """llm_adapter/, visual_encoder_adapter/ and projector/, from either kind of names; read back they are the same model."""
    write_tiny_llava_internlm2(tmp_path / "base")
    run = checkpoint(tmp_path / "run", tmp_path / "base", r=4, alpha=2.0, **XTUNER[case])
    mg2hf(tmp_path / "base", tmp_path / "parts", naming="xtuner")
    mg2hf(run, tmp_path / "out", adapter_only=True, naming="xtuner", base=tmp_path / "parts")
    mg2hf(run, tmp_path / "merged", merge=True, naming="xtuner")
    linears = {"": "model.layers.0.attention.wqkv", "visual_encoder": "vision_model.encoder.layers.0.mlp.fc1"}
    for folder, part in (("llm_adapter", ""), ("visual_encoder_adapter", "visual_encoder")):
        config, adapter = adapter_of(tmp_path / "out" / folder)
        assert config["base_model_name_or_path"] == str(tmp_path / "parts" / part).rstrip("/")
        assert f"{linears[part]}.lora_A.weight" in adapter
        base = load_file(tmp_path / "parts" / part / "model.safetensors")
        after = load_file(tmp_path / "merged" / part / "model.safetensors")
        flat = {"lora_alpha": config["lora_alpha"], "r": config["r"], "rank_pattern": {}, "alpha_pattern": {}}
        assert_same(after, merged(base, flat, adapter))
    assert (tmp_path / "out" / "projector" / "model.safetensors").read_bytes() == (
        tmp_path / "merged" / "projector" / "model.safetensors"
    ).read_bytes()
    assert (
        main(
            [
                "merge",
                "--base",
                str(tmp_path / "base"),
                "--adapter",
                str(tmp_path / "out"),
                "--out",
                str(tmp_path / "again"),
            ]
        )
        == 0
    )
    with open_source(tmp_path / "again") as again, open_source(run) as source:
        for name in source.infos:
            rows = again.read(name).shape[0] - ("output_layer" in name)  # <image>'s row stays behind in XTuner's head
            assert torch.equal(again.read(name)[:rows], source.read(name)[:rows]), name
