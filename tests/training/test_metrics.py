"""metrics.jsonl, TensorBoard and progress lines of a run, and what a resumed one does to them."""

import json

import pytest
import yaml

from megatron_vlm.training.evaluate import EvalResult
from megatron_vlm.training.metrics import LoggingConfig, Metrics
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
