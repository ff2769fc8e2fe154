"""Reports to trackers: what a package is asked for, by a stand-in that notes its calls; its absence; real ones offline."""

import json
import sys
from importlib.util import find_spec

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.training.metrics.config import LoggingConfig
from megatron_vlm.training.metrics.trackers import TRACKERS

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

def Text(text):
    return text

def init(**given):
    write("init", given)
    return Run()
"""


@pytest.fixture
def calls(request, tmp_path, monkeypatch):
    """Function that returns the calls so far of a package, whose name is the parameter."""
    folder = tmp_path / "packages" / request.param
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(RECORDER)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, request.param, raising=False)
    monkeypatch.delenv(f"{request.param.upper()}_PROJECT", raising=False)
    yield lambda: [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    sys.modules.pop(request.param, None)


BOTH = pytest.mark.parametrize(("calls", "name"), [("wandb", "wandb"), ("swanlab", "swanlab")], indirect=["calls"])


@BOTH
def test_a_run_and_its_resume_are_one(calls, name, tmp_path):
    for resumed, step in ((False, 1), (True, 2), (False, 1)):
        writer = TRACKERS[name](tmp_path, "mine", {"data": {"seq_length": 8}}, resumed=resumed)
        writer.add_scalar("train/loss", 0.5, step)
        writer.add_scalar("train/grad_norm", None, step)
        writer.add_text("samples/0", "seven", step)
        writer.close()
    names = [call[0] for call in calls()]
    assert names == ["init", "log", "log", "finish"] * 3
    first, resumed, fresh = (call[1] for call in calls() if call[0] == "init")
    assert (first["project"], first["name"]) == ("megatron_vlm", "mine")
    assert {"wandb": first.get("dir"), "swanlab": first.get("log_dir", "").removesuffix("/swanlog")}[name] == str(
        tmp_path
    )
    assert first["config"] == {"data": {"seq_length": 8}} and first["resume"] == "allow"
    assert first["id"] == resumed["id"] != fresh["id"]
    assert calls()[1][1:] == [{"train/loss": 0.5}, 1] and calls()[2][1:] == [{"samples/0": "seven"}, 1]


@BOTH
def test_its_project_is_named_by_its_own_variable(calls, name, tmp_path, monkeypatch):
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "scans")
    TRACKERS[name](tmp_path, "mine", {}, resumed=False)
    assert calls()[0][1]["project"] == "scans"
    assert LoggingConfig(**{name: True}).trackers == [name]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named_before_the_run(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"needs the package {name}, which is not installed: `pip install {name}`"):
        LoggingConfig(**{name: True})


LEFT = {"wandb": "wandb/offline-run-*/run-*.wandb", "swanlab": "swanlog/run-*/run-*.swanlab", "mlflow": "mlflow.db"}


@pytest.mark.full
@pytest.mark.parametrize(("name", "left"), [(name, left) for name, left in LEFT.items() if find_spec(name)])
def test_the_real_package_without_a_network(name, left, tmp_path, monkeypatch):
    """A run and its resume, where the package is installed: what it leaves on the disk."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    for resumed, step in ((False, 1), (True, 2)):
        writer = TRACKERS[name](tmp_path, "mine", {"data": {"seq_length": 8, "train": ["a"]}}, resumed=resumed)
        writer.add_scalar("train/loss", 0.5 / step, step)
        writer.add_text("samples/0", "seven", step)
        writer.close()
    assert list(tmp_path.glob(left)), sorted(tmp_path.rglob("*"))
    if name == "mlflow":
        history = writer.client.get_metric_history(writer.run_id, "train/loss")
        assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.25)]
        run = writer.client.get_run(writer.run_id)
        assert run.data.params["data.seq_length"] == "8" and run.info.status == "FINISHED"
        assert [path.read_text() for path in sorted(tmp_path.rglob("samples/0/*.txt"))] == ["seven", "seven"]
