"""A run from parts: which model they make, once, and a first stage's checkpoint in place of a projector."""

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.launch.parts import assemble
from megatron_vlm.options.launch_config import LaunchConfig
from megatron_vlm.testing.twins.llava_internlm2 import write_tiny_parts
from megatron_vlm.weights.megatron_dir import read_manifest
from tests.weights.checkpoint_folders import make


def test_parts_make_a_model_once(tmp_path):
    parts = write_tiny_parts(tmp_path / "parts", std=0.05)
    fields = {name: str(parts[name]) for name in ("llm", "vision")}
    first = assemble(LaunchConfig(**fields), None, tmp_path / "out", None)
    assert read_manifest(tmp_path / "out" / first.rpartition("/")[2]).family == "llava_internlm2"
    stamp = (tmp_path / "out" / first.rpartition("/")[2] / "megatron.json").stat().st_mtime_ns
    assert assemble(LaunchConfig(**fields), None, tmp_path / "out", None) == first
    assert (tmp_path / "out" / first.rpartition("/")[2] / "megatron.json").stat().st_mtime_ns == stamp
    trained = assemble(LaunchConfig(**fields, projector=str(parts["projector"])), None, tmp_path / "out", None)
    assert trained != first
    stage = make(tmp_path / "stage1", 12)
    assert assemble(
        LaunchConfig(**fields, projector=str(stage.parent / "iter_12.pth")), None, tmp_path / "out", None
    ) == str(stage)


def test_parts_that_say_too_little():
    for fields in ({"llm": "a"}, {"vision": "b"}, {"projector": "c"}):
        with pytest.raises(ConfigError, match="takes --llm and --vision, and may take --projector; given: --"):
            LaunchConfig(**fields)
