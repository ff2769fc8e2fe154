"""The front starts its ranks once, and says what became of them."""

import subprocess
import sys

import pytest

from megatron_vlm.errors import ConfigError, MegatronVLMError, TrainingError
from megatron_vlm.serve.config import ServeConfig
from megatron_vlm.serve.engine import Engine


def test_it_is_no_program_for_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="run it once, without torchrun"):
        Engine(ServeConfig.from_dict({"models": [{"load": "x"}]}))


def test_who_talks_to_the_user_loads_no_torch():
    code = "import megatron_vlm.cli.chat, megatron_vlm.cli.demo, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.full
def test_a_model_that_cannot_be_opened_and_ranks_that_die(tmp_path, twins):
    def served(folder, tp):
        return ServeConfig.from_dict({"models": [{"load": str(folder)}], "device": "cpu", "tp": tp})

    with Engine(served(tmp_path, 1)) as engine, pytest.raises(MegatronVLMError, match="neither an HF model"):
        engine.ready()
    with Engine(served(twins[0], 2)) as engine:
        assert engine.ready() == [str(twins[0])]
        engine._ranks[1].kill()
        with pytest.raises(TrainingError, match="ended by itself"):
            list(engine.events())
