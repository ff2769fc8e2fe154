"""metrics.jsonl, TensorBoard and progress lines of a run, and what a resumed one does to them."""

import errno
import json
import os
import resource

import pytest
import yaml

from megatron_vlm.errors import ConfigError
from megatron_vlm.training.answering.prompts import Prompt
from megatron_vlm.training.evaluate import EvalResult
from megatron_vlm.training.metrics.config import LoggingConfig
from megatron_vlm.training.metrics.logger import Metrics
from megatron_vlm.training.step import StepResult

RATES = {"llm": 1e-3, "vision": 1e-4, "connector": 1e-3}
KEYS = {
    "iteration", "loss", "grad_norm", "lr", "lr_vision", "lr_connector", "tokens", "supervised_tokens", "images",
    "tokens_per_second", "step_seconds", "memory_gib", "loss_scale", "skipped", "holes", "consumed_samples",
}  # fmt: skip


def result(loss: float = 2.5, **changes) -> StepResult:
    values = {
        "loss": loss, "grad_norm": 1.5, "skipped": False, "loss_scale": 1.0, "tokens": 100, "supervised_tokens": 60,
        "images": 4, "samples": 3, "holes": 1, "truncated": 0, "memory_gib": 0.5,
    }  # fmt: skip
    return StepResult(**{**values, **changes})


def lines(path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def run(path, steps, start=0, **logging) -> None:
    metrics = Metrics(path, LoggingConfig(**logging), {"training": {"seed": 1}}, start=start, total=20)
    for step in steps:
        metrics.step(step, result(), RATES, seconds=0.5, consumed_samples=3 * step)
    metrics.evaluation(steps[-1], EvalResult(loss=2.25, samples=7, supervised_tokens=70))
    metrics.close()


def test_every_step_has_a_line_with_the_agreed_keys(tmp_path):
    run(tmp_path, range(1, 5))
    *steps, evaluation = lines(tmp_path)
    assert [line["iteration"] for line in steps] == [1, 2, 3, 4]
    assert set(steps[0]) >= KEYS
    assert steps[0]["tokens_per_second"] == 200
    assert evaluation == {"iteration": 4, "eval_loss": 2.25}
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"training": {"seed": 1}}


def test_resume_removes_later_lines_and_an_incomplete_one(tmp_path):
    run(tmp_path, range(1, 7))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 7, "lo')
    run(tmp_path, range(5, 7), start=4)
    assert [line["iteration"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 6]


def test_a_new_run_keeps_the_metrics_of_the_old_one(tmp_path):
    run(tmp_path, range(1, 3))
    old = (tmp_path / "metrics.jsonl").read_text()
    run(tmp_path, range(1, 2))
    assert (tmp_path / "metrics.1.jsonl").read_text() == old
    assert len(lines(tmp_path)) == 2


def test_a_disk_that_is_full_before_the_first_line_is_told_of(tmp_path):
    """Nothing has been trained yet."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(ConfigError, match=r"cannot write .*config.yaml: File too large: make room"):
            Metrics(tmp_path, LoggingConfig(tensorboard=False), {"training": {"seed": 1}}, start=0, total=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    metrics = Metrics(tmp_path, LoggingConfig(tensorboard=False), {}, start=0, total=1)
    metrics.step(1, result(float("nan")), RATES, seconds=1.0, consumed_samples=1)
    metrics.close()
    assert lines(tmp_path)[0]["loss"] is None


def test_tensorboard_has_the_points_of_the_log_interval(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, range(1, 21), log_interval=5)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 5, 10, 15, 20]
    assert events.Scalars("eval/loss")[0].value == pytest.approx(2.25)


def test_a_full_disk_ends_nothing_and_loses_no_line(tmp_path, capsys):
    """The files may not grow past a bound for a while, as on a full disk: partial writes, then refusals, then room again."""
    from megatron_vlm.log import setup_logging

    setup_logging(0, tmp_path / "train.log")
    metrics = Metrics(tmp_path, LoggingConfig(log_interval=1), {}, start=0, total=60)
    record = (Prompt(text="What?"),), ("That.",)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(1, 61):
        if step == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        if step == 50:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        metrics.step(step, result(), RATES, seconds=0.5, consumed_samples=3 * step)
        metrics.answers(step, *record)
        for writer in metrics.writers:
            writer.flush()
    metrics.evaluation(60, EvalResult(loss=2.25, samples=7, supervised_tokens=70))
    metrics.close()
    setup_logging(0)
    assert [line["iteration"] for line in lines(tmp_path)] == [*range(1, 61), 60]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["iteration"] for sample in samples] == list(range(1, 61))
    progress = (tmp_path / "train.log").read_text()
    assert all(f"iteration {step}/60 |" in progress for step in range(1, 61))
    told = capsys.readouterr()
    refused = f"cannot be written: {os.strerror(errno.EFBIG)}. Its lines wait"
    for name in ("metrics.jsonl", "samples.jsonl", "train.log"):
        assert told.out.count(f"{tmp_path / name} {refused}") == 1, told.out
        assert f"{tmp_path / name} is written again" in told.out
    assert told.out.count("TensorBoard fails, and is tried again from time to time: OSError") == 1
    assert "Traceback" not in told.out + told.err
    assert told.out.count("\n") < 200


def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"the run cannot report to .*file/out.*logging.output_dir"):
        Metrics.of_run(tmp_path / "file" / "out", LoggingConfig(), {}, start=0, total=1)
