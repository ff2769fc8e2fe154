"""A run from parts: which model they make, once, and a first stage's checkpoint in place of a projector."""

import pytest
import torch

from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.errors import ConfigError
from megatron_vlm.launch.parts import assemble
from megatron_vlm.options.flags import parse_flags
from megatron_vlm.options.launch_config import LaunchConfig
from megatron_vlm.options.request import read_request
from megatron_vlm.testing.twins.llava_internlm2 import write_tiny_parts
from megatron_vlm.testing.twins.parts import write_tiny_llm, write_tiny_tower
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


def test_a_trained_connector_of_an_internvl(tmp_path):
    write_tiny_llm(tmp_path / "llm", "qwen3")
    write_tiny_tower(tmp_path / "tower", "internvit")
    state = {f"{n}.{kind}": torch.full(size, n + 0.5) for n, shape in ((0, (192,)), (1, (64, 192)), (3, (64, 64)))
             for kind, size in (("weight", shape), ("bias", shape[:1]))}  # fmt: skip
    torch.save(state, tmp_path / "mlp1.pth")
    words = f"--llm_path {tmp_path}/llm --vision_path {tmp_path}/tower --mlp_path"
    request = read_request(
        {}, parse_flags([*words.split(), f"{tmp_path}/mlp1.pth"], "launch").settings, command="launch"
    )
    folder = assemble(request.launch, None, tmp_path / "out", None)
    with open_source(folder) as source:
        assert source.spec.name == "internvl3" and bool((source.read("connector.mlp.linear_fc2.weight") == 3.5).all())
    assert not [key for key, _ in parse_flags(["--mlp_path", "None"], "launch").settings]


def test_parts_that_say_too_little():
    for fields in ({"llm": "a"}, {"vision": "b"}, {"projector": "c"}):
        with pytest.raises(ConfigError, match="takes --llm and --vision, and may take --projector; given: --"):
            LaunchConfig(**fields)
