"""The folder that a run was started from vanishes: the run saves, its checkpoint is whole. No output lies in it."""

import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.runs import train


def train_without(argv: list[str], folder: str, metrics: str) -> tuple[int, str]:
    """On a rank: trains; the folder goes once the first step is done."""

    def watch() -> None:
        while not (Path(metrics).exists() and Path(metrics).read_text().count("\n")):
            threading.Event().wait(0.005)
        shutil.rmtree(folder)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    result = train(argv)
    watcher.join(5)
    return result


@pytest.mark.parametrize("kind", ["hf", "megatron", "checkpoint"])
def test_a_run_outlives_what_it_started_from(command, twin, tmp_path, kind):
    start = tmp_path / "start"
    if kind == "hf":
        shutil.copytree(twin, start)
    elif kind == "megatron":
        hf2mg(twin, start)
    else:
        assert train(command("first", f"--save {start} --train-iters 1")) == (0, "")
    argv = command("out", f"--save {tmp_path / 'out'} --train-iters 6 --save-interval 3", load=start)
    argv += ["--finetune"] if kind == "checkpoint" else []
    assert run_distributed(train_without, argv, str(start), str(tmp_path / "out" / "metrics.jsonl"), dp=1) == [(0, "")]
    assert not start.exists()
    mg2hf(tmp_path / "out", tmp_path / "export")
    before, after = load_file(twin / "model.safetensors"), load_file(tmp_path / "export" / "model.safetensors")
    assert before.keys() == after.keys() and not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    names = {path.name for path in twin.iterdir()}
    assert names <= {path.name for path in (tmp_path / "export").iterdir()}


@pytest.mark.parametrize("flag", ["--save", "--output-dir"])
def test_an_output_in_the_model_is_refused_before_the_start(command, twin, tmp_path, flag):
    model = shutil.copytree(twin, tmp_path / "model")
    (tmp_path / "link").symlink_to(model)
    for place in (model, model / "run", tmp_path / "link" / "run"):
        code, text = train(command("out", f"--train-iters 1 {flag} {place}", load=model))
        assert code == 1 and ("lies in the folder" in text or "is the folder" in text) and str(model) in text
    assert not list(model.glob("**/iter_*"))
