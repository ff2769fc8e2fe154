"""A run goes on from an adapter as from the run that wrote it."""

import json

import torch

from megatron_vlm.conversion.convert import mg2hf
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.peft.merge import continued, full_tensors
from megatron_vlm.peft.select import make_plan, named_mapping
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from tests.peft.adapter_runs import checkpoint


def test_a_run_goes_on_from_an_adapter(tmp_path):
    """Targets, ranks, scales and tensors of an adapter are those of the run that it came from."""
    write_tiny_idefics2(tmp_path / "base")
    run = checkpoint(
        tmp_path / "run", tmp_path / "base", target_modules=("q_proj", "fc1", "gate_proj"), r=4, alpha=2.0, vision_r=2,
        rank_pattern={r"model\.text_model\.layers\.2\..*": 3}, alpha_pattern={"gate_proj": 5.0},
        modules_to_save=("perceiver_resampler",),
        bias="lora_only", dropout=0.05,
    )  # fmt: skip
    mg2hf(run, tmp_path / "adapter", adapter_only=True)
    with open_source(run) as source, open_source(tmp_path / "base") as base:
        _, config, adapter = continued(PeftConfig(adapter=str(tmp_path / "adapter"), dropout=0.05), base)
        plan = make_plan(base.spec, base.config, config, base.infos)
        named = named_mapping(base.spec, base.config, None)
        tensors = full_tensors(adapter, plan, named, base.read)
        again = json.loads((run / "iter_0000001" / "state.json").read_text())["peft"]["config"]
        first = make_plan(base.spec, base.config, PeftConfig.from_dict(again), base.infos)
        assert [(t.name, t.r, t.alpha, t.scaling) for t in plan.targets] == [
            (t.name, t.r, t.alpha, t.scaling) for t in first.targets
        ]
        assert plan.names == first.names == tensors.keys()
        stored = full_tensors(source.adapter, first, named, base.read)
        assert all(torch.equal(tensors[name], stored[name]) for name in stored)
