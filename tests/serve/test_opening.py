"""A model from what XTuner leaves: language model, tower, projector and adapters in folders of their own."""

import pytest
import torch

from megatron_vlm.conversion.convert import mg2hf
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.errors import ConfigError
from megatron_vlm.serve.config import ServedModel
from megatron_vlm.serve.opening import open_served
from megatron_vlm.testing.twins.llava_internlm2 import write_tiny_llava_internlm2
from tests.peft.adapter_runs import checkpoint
from tests.peft.test_adapter_folders import XTUNER


def tensors(model):
    with open_served(model) as source:
        return {name: source.read(name) for name in source.infos}


def test_parts_and_adapters_are_the_merged_model(tmp_path):
    write_tiny_llava_internlm2(tmp_path / "base")
    run = checkpoint(tmp_path / "run", tmp_path / "base", r=4, alpha=2.0, **XTUNER["xtuner's names"])
    parts, out = tmp_path / "parts", tmp_path / "out"
    mg2hf(tmp_path / "base", parts, naming="xtuner")
    mg2hf(run, out, adapter_only=True, naming="xtuner", base=parts)
    with open_source(run) as source:
        expected = {name: source.read(name) for name in source.infos}

    def check(found):
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            rows = min(len(tensor), len(expected[name]), 80)  # the row of <image> is made anew
            assert torch.equal(tensor[:rows], expected[name][:rows]), name

    given = dict(load=str(parts), vision=str(parts / "visual_encoder"))
    check(tensors(ServedModel(**given, llava=str(out))))
    (tmp_path / "moved").mkdir()
    (out / "llm_adapter").rename(tmp_path / "moved" / "adapter")
    check(tensors(ServedModel(**given, llava=str(out), llm_adapter=str(tmp_path / "moved" / "adapter"))))
    before = tensors(ServedModel(**given, llava=str(parts)))
    assert any(not torch.equal(before[name][:8], expected[name][:8]) for name in before)
    with (
        pytest.raises(ConfigError, match="has no visual_encoder, as XTuner leaves out"),
        open_served(ServedModel(load=str(parts), llava=str(out))),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="has no projector: name the folder"),
        open_served(ServedModel(load=str(parts), llava=str(tmp_path / "moved"))),
    ):
        pass
