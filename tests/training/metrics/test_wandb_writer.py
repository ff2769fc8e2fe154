"""Reports to Weights & Biases: what its package is asked for, by a stand-in that writes down its calls, and its absence."""

import json
import sys

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.training.metrics.config import LoggingConfig
from megatron_vlm.training.metrics.wandb_writer import WandbWriter

RECORDER = """
import json, pathlib
calls = pathlib.Path(__file__).with_name("calls.jsonl")

def write(*call):
    with calls.open("a") as file:
        file.write(json.dumps(call) + "\\n")

class Run:
    def log(self, values, step):
        write("log", values, step)
    def finish(self):
        write("finish")

def init(**given):
    write("init", given)
    return Run()
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Function that returns the calls so far."""
    (tmp_path / "packages" / "wandb").mkdir(parents=True)
    (tmp_path / "packages" / "wandb" / "__init__.py").write_text(RECORDER)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    yield lambda: [
        json.loads(line) for line in (tmp_path / "packages" / "wandb" / "calls.jsonl").read_text().splitlines()
    ]
    sys.modules.pop("wandb", None)


def test_a_run_and_its_resume_are_one(calls, tmp_path):
    for resumed, step in ((False, 1), (True, 2), (False, 1)):
        writer = WandbWriter(tmp_path, "mine", {"data": {"seq_length": 8}}, resumed=resumed)
        writer.add_scalar("train/loss", 0.5, step)
        writer.add_scalar("train/grad_norm", None, step)
        writer.add_text("samples/0", "seven", step)
        writer.close()
    names = [call[0] for call in calls()]
    assert names == ["init", "log", "log", "finish"] * 3
    first, resumed, fresh = (call[1] for call in calls() if call[0] == "init")
    assert (first["project"], first["name"], first["dir"]) == ("megatron_vlm", "mine", str(tmp_path))
    assert first["config"] == {"data": {"seq_length": 8}} and first["resume"] == "allow"
    assert first["id"] == resumed["id"] != fresh["id"]
    assert calls()[1][1:] == [{"train/loss": 0.5}, 1] and calls()[2][1:] == [{"samples/0": "seven"}, 1]


def test_its_project_is_named_by_its_own_variable(calls, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "scans")
    WandbWriter(tmp_path, "mine", {}, resumed=False)
    assert calls()[0][1]["project"] == "scans"
    assert LoggingConfig(wandb=True).wandb


def test_a_missing_package_is_named_before_the_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="needs the package wandb, which is not installed: `pip install wandb`"):
        LoggingConfig(wandb=True)
