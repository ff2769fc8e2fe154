"""What is read back of a run's folder."""

import json

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.training.metrics.run_files import RunFiles, smoothed

EVIL = "\"'><script>alert(1)</script>"


def write_run(folder, *, steps=40, shift=0.0):
    """A run's files with hostile names, a restart at 20, two sources, evaluations, answers and samples left out."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "samples": 100, "excluded": {"too_long": 7, "placeholders": 2}, "truncated": 3, "tokens": 5000,
        "supervised_tokens": 900,
        "mixture": {EVIL: {"sample_share": 0.75}, "b": {"sample_share": 0.25}},
    }  # fmt: skip
    starts = [
        {"time": "2026-01-01T00:00:00", "iteration": first, "total": steps, "world": 2, "device": "cpu", "layout": "tp 2",
         "precision": "bf16", "trained": {"llm": 12345}, "data": data, "versions": {"torch": "2"}}
        for first in (0, 20)
    ]  # fmt: skip
    lines = []
    for n in range(1, steps + 1):
        lines.append(
            {"iteration": n, "loss": 3 / n + shift + n % 2, "grad_norm": 1.0, "lr": 1e-4, "lr_vision": 1e-5, "lr_connector": 1e-4,
             "tokens": 100, "images": 4, "tokens_per_second": 50.0, "step_seconds": 2.0, "memory_gib": 1.5, "loss_scale": 1.0,
             "consumed_samples": 4 * n, "tflops": 0.5, "mfu": 0.25, "sources": [3, 1] if n % 2 else [2, 2]}
        )  # fmt: skip
        if n % 10 == 0:
            lines += [{"iteration": n, "eval_loss": 2.0 / n + shift}, {"iteration": n, "eval_exact_match": n / 100}]
    lines[4]["loss"] = None
    answers = [
        {"iteration": n, "prompt": EVIL, "images": [f"/no/{EVIL}.png"], "answer": f"{EVIL} 答 {n}"}
        for n in range(0, 40)
    ]
    for name, content in (("metrics", lines), ("samples", answers), ("starts", starts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content) + '{"cut')
    (folder / "quarantine.jsonl").write_text(json.dumps({"reason": "unreadable"}) + "\n")
    (folder / "config.yaml").write_text(f"data:\n  train: [{json.dumps(EVIL)}]\n")
    return folder


def test_a_run_is_read_back(tmp_path):
    run = RunFiles.read(write_run(tmp_path))
    assert len(run.steps) == 40 and len(run.evaluations) == 8 and len(run.starts) == 2
    assert run.series("eval_loss") == [(10, 0.2), (20, 0.1), (30, pytest.approx(2 / 30)), (40, 0.05)]
    assert len(run.series("loss")) == 39 and run.scores == ["eval_exact_match"]
    assert run.left_out == {"too long": 7, "placeholders": 2, "unreadable (while training)": 1}
    assert run.shares == [(EVIL, 0.75, 100 / 160, 100), ("b", 0.25, 60 / 160, 60)]


def test_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no metrics.jsonl: name the folder of a run"):
        RunFiles.read(tmp_path)


def test_smoothing_starts_at_the_first_value_and_follows_a_steep_start():
    assert smoothed([3.0] * 50) == pytest.approx([3.0] * 50) and smoothed([]) == []
    assert smoothed([1.0, 3.0]) == pytest.approx([1.0, 1 + 2 / 1.125])
    falling = [10.0 / n for n in range(1, 4001)]
    assert all(value < 2.5 * raw for raw, value in zip(falling, smoothed(falling)))
    noisy = smoothed([n % 2 for n in range(4000)])
    assert all(abs(value - 0.5) < 0.02 for value in noisy[1000:])
