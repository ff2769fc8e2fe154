"""docs/lora.md on a tiny twin: every command of the page, from training to PEFT and back."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.testing.runs import write_shards
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from tests.examples.guides import run_guide

STEPS = (
    "training.train_epochs=null training.train_iters=3 training.precision=fp32 training.device=cpu data.seq_length=256 "
    "data.shortest_edge=24 data.num_workers=0 checkpoint.save_interval=null"
)


@pytest.mark.slow
@pytest.mark.full
def test_page(tmp_path):
    write_tiny_idefics2(tmp_path / "model")
    write_shards(tmp_path / "data", 24, seed=1)
    work = tmp_path / "work"
    values = {"MODEL": tmp_path / "model", "DATA": tmp_path / "data" / "shards", "WORK": work, "GPUS": 2}
    output = run_guide("../lora.md", values, {"megatron_vlm train": STEPS})
    assert "Idefics2ForConditionalGeneration" in output
    config = json.loads((work / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "model") and config["r"] == 8
    merged, again = (load_file(work / name / "model.safetensors") for name in ("merged", "merged-again"))
    assert all(torch.equal(merged[name], again[name]) for name in merged)
    # The last run trained what the adapter has, from where the first ended: steps at a rate that warms up move it little.
    with open_source(work / "more") as more, open_source(work / "adapter") as adapter:
        ours, theirs = more.adapter.pairs, adapter.adapter.pairs
        assert ours.keys() == theirs.keys() and more.base_name == str(tmp_path / "model")
        assert all(float((ours[name].a - pair.a).abs().max()) < 2e-3 for name, pair in theirs.items())
