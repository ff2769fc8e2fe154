"""SIGKILL again and again, at any moment and inside saves: nothing is lost, and the end is that of a run that was left alone."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from test_main import files_of, finish, run_argv, start

from megatron_vlm.testing import commands
from megatron_vlm.testing.runs import metrics_of

__all__ = ["run_argv"]  # the fixture


def lines_of(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def saving(out: Path) -> bool:
    return any(out.glob("iter_*.tmp-*"))


def kill_at(ranks: list[commands.Command], out: Path, draw: random.Random, inside_a_save: bool) -> bool:
    """Waits for a moment and kills all ranks, or one; False: the run came to its end before."""
    wanted = lines_of(out) + draw.randint(1, 2)
    while not (saving(out) if inside_a_save else lines_of(out) >= wanted):
        if any(rank.poll() is not None for rank in ranks):
            return False
        time.sleep(0.001)
    if not inside_a_save:
        time.sleep(draw.uniform(0, 0.2))
    for rank in ranks if draw.random() < 0.7 else [draw.choice(ranks)]:
        if rank.poll() is None:
            os.killpg(rank.pid, signal.SIGKILL)
    return True


def kill_and_resume(run_argv, tmp_path: Path, kills: int, iterations: int) -> dict[str, int]:
    """A run that is killed ``kills`` times, a tenth of them (one at least) inside a save, beside one that is not."""
    draw, whole, cut = random.Random(kills), tmp_path / "whole", tmp_path / "cut"
    more = f"--train-iters {iterations} --save-interval 1 --keep-last 2"
    assert finish(start(run_argv(whole, more), tmp_path / "whole.log")) == [0, 0]
    counts = {"killed": 0, "inside a save": 0}
    while counts["killed"] < kills:
        load = [f"--load {cut}"] if (cut / "latest_checkpointed_iteration.txt").exists() else []
        ranks = start(run_argv(cut, more, *load), tmp_path / "cut.log")
        inside = counts["inside a save"] * 10 < kills
        if kill_at(ranks, cut, draw, inside):
            counts["killed"] += 1
            counts["inside a save"] += inside
        codes = finish(ranks, timeout=60)
        assert all(code in (0, 1, -signal.SIGKILL) for code in codes), codes
        if codes == [0, 0]:
            break
    assert finish(start(run_argv(cut, more, f"--load {cut}"), tmp_path / "cut.log")) == [0, 0]
    assert metrics_of(cut) == metrics_of(whole)
    assert [line["iteration"] for line in metrics_of(cut)] == list(range(1, iterations + 1))
    last = f"iter_{iterations:07d}"
    assert files_of(cut / last) == files_of(whole / last) != {}
    assert not saving(cut)
    return counts


@pytest.mark.slow
def test_three_kills(run_argv, tmp_path):
    assert kill_and_resume(run_argv, tmp_path, 3, 12)["killed"] == 3


@pytest.mark.full
@pytest.mark.parametrize("part", range(8))
def test_two_hundred_kills(run_argv, tmp_path, part):
    counts = kill_and_resume(run_argv, tmp_path, 25, 90 + part)
    print(counts)
    assert counts["killed"] == 25 and counts["inside a save"] >= 3
