"""What a start goes on from."""

import pytest

from megatron_vlm.launch.checks import Report
from megatron_vlm.launch.run_plan import _start_from
from megatron_vlm.weights.checkpoint_dir import TRACKER
from megatron_vlm.weights.checkpoint_write import begin, commit
from tests.launch.commands import request_of


def checkpoint(folder, iteration=5):
    commit(begin(folder, iteration, 1000), {}, {"iteration": iteration})


def start(load, out, more=""):
    request, report = request_of(f"--load {load} --train_json t --output_dir {out} {more}"), Report()
    return _start_from(request, report), report, request.run["checkpoint"]


def test_a_run_starts_from_its_model(tmp_path):
    load, report, section = start("model", tmp_path / "out")
    assert load == "model" and not report.findings and "finetune" not in section
    (tmp_path / "out" / "iter_0000005.tmp-abcdef").mkdir(parents=True)  # a first save that was killed
    assert start("model", tmp_path / "out")[0] == "model"


@pytest.mark.parametrize("tracked", [True, False])
def test_a_run_goes_on_from_its_own_checkpoint_whatever_the_tracker(tmp_path, tracked):
    out = tmp_path / "out"
    checkpoint(out)
    if not tracked:
        (out / TRACKER).unlink()
    load, report, section = start("model", out)
    assert load == str(out) and "goes on from the last one" in report.findings[0].text and "finetune" not in section
    assert start("model", out, "--overwrite_output_dir True")[0] == "model"


def test_a_checkpoint_of_another_run_gives_its_weights(tmp_path):
    checkpoint(tmp_path / "first")
    (tmp_path / "first" / TRACKER).unlink()
    for load in (tmp_path / "first", tmp_path / "first" / "iter_0000005"):
        start_of, report, section = start(load, tmp_path / "out")
        assert start_of == str(load) and section["finetune"] is True and not report.findings


def test_weights_alone_are_taken_of_the_runs_own_folder_or_into_another(tmp_path):
    for name in ("first", "out"):
        checkpoint(tmp_path / name)
    load, report, _ = start(tmp_path / "out", tmp_path / "out", "--finetune")
    assert load == str(tmp_path / "out") and not report.failed
    _, report, _ = start(tmp_path / "first", tmp_path / "out", "--finetune")
    assert "of another run than the one that checkpoint.finetune starts from" in report.failed[0].text
    assert "leave checkpoint.finetune out to go on from them" in report.failed[0].advice
