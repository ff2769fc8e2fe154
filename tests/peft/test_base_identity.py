"""A base is known again wherever it lies, and told from others."""

import pytest

from megatron_vlm.conversion.convert import mg2hf
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.errors import CheckpointError
from megatron_vlm.peft.base_identity import base_mark, marks_apart
from megatron_vlm.testing.twins.internlm2 import write_tiny_internlm2
from tests.peft.adapter_runs import adapter_of, checkpoint, make


def test_base_that_moved_or_changed(tmp_path):
    write_tiny_internlm2(make(tmp_path / "base"))
    write_tiny_internlm2(make(tmp_path / "other"), seed=7)
    run = checkpoint(tmp_path / "run", tmp_path / "base", target_modules=("wqkv",))
    with pytest.raises(CheckpointError, match=r"other holds other weights than the base .* name that one with"):
        open_source(run, base=tmp_path / "other")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"their base is not at .*base: name its new place"):
        mg2hf(run, tmp_path / "no", merge=True)
    mg2hf(run, tmp_path / "merged", merge=True, base=tmp_path / "moved")
    mg2hf(run, tmp_path / "adapter", adapter_only=True, base=tmp_path / "moved")
    assert adapter_of(tmp_path / "adapter")[0]["base_model_name_or_path"] == str(tmp_path / "moved")


def test_marks_know_weights_through_rounding(tmp_path):
    write_tiny_internlm2(make(tmp_path / "base"))
    write_tiny_internlm2(make(tmp_path / "other"), seed=7)
    mg2hf(tmp_path / "base", tmp_path / "bf16", dtype="bf16")
    marks = {}
    for name in ("base", "other", "bf16"):
        with open_source(tmp_path / name) as source:
            marks[name] = base_mark(source.infos, source.read)
    assert marks_apart(marks["base"], marks["base"]) == 0 and marks_apart(marks["base"], marks["other"]) > 100
    assert marks["bf16"] != marks["base"] and marks_apart(marks["bf16"], marks["base"]) == 0
    assert marks_apart((1.0, 2.0, 0.0), (1.004, 2.0, 1e-8)) == 0 and marks_apart((1.0, 2.0), (1.02, 2.0, 3.0)) == 2
