"""SIGKILL again and again, at any moment and inside saves: nothing is lost, and the end is that of a run that was left alone."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from megatron_vlm.testing import commands
from megatron_vlm.testing.runs import metrics_of
from megatron_vlm.weights.checkpoint_dir import holds_checkpoints
from tests.cli.test_main import files_of, finish, run_argv, start

__all__ = ["run_argv"]  # the fixture


def lines_of(out: Path) -> int:
    try:
        return len((out / "metrics.jsonl").read_text().splitlines())
    except FileNotFoundError:  # not yet, or a start from nothing puts the one before aside
        return 0


def saving(out: Path) -> set[Path]:
    """Folders that a save is writing, or that a killed one left."""
    return set(out.glob("iter_*.tmp-*"))


def kill_at(ranks: list[commands.Command], out: Path, draw: random.Random, inside_a_save: bool) -> str:
    """Waits for a moment and kills all ranks, or one; returns where it fell, empty: the run came to its end before.

    A save is a matter of milliseconds here: where five iterations bring none to light, the kill falls elsewhere.
    """
    lines, left = lines_of(out), saving(out)
    wanted, last = lines + draw.randint(1, 2), lines + 5
    where = ""
    while not where:
        if any(rank.poll() is not None for rank in ranks):
            return ""
        if inside_a_save:
            where = "inside a save" if saving(out) - left else "elsewhere" if lines_of(out) >= last else ""
        elif lines_of(out) >= wanted:
            where = "elsewhere"
            time.sleep(draw.uniform(0, 0.2))
        else:
            time.sleep(0.001)
    kill = draw.choice((os.killpg, os.kill))  # with what it started, or alone: that ends with it
    for rank in ranks if draw.random() < 0.7 else [draw.choice(ranks)]:
        if rank.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ended with the one that was killed before it
                kill(rank.pid, signal.SIGKILL)
    return where


def kill_and_resume(run_argv, tmp_path: Path, kills: int, iterations: int, how: str = "") -> dict[str, int]:
    """A run that is killed ``kills`` times, a tenth of them (one at least) inside a save, beside one that is not.

    Args:
        how: flags of the killed run alone, which change neither its numbers nor its files.
    """
    draw, whole, cut = random.Random(iterations), tmp_path / "whole", tmp_path / "cut"
    more = f"--train-iters {iterations} --save-interval 1 --keep-last 2"
    assert finish(start(run_argv(whole, more), tmp_path / "whole.log")) == [0, 0]
    counts = {"inside a save": 0, "elsewhere": 0}
    while sum(counts.values()) < kills:
        load = [f"--load {cut}"] if holds_checkpoints(cut) else []
        ranks = start(run_argv(cut, more, how, *load), tmp_path / "cut.log")
        inside = counts["inside a save"] * 10 < kills
        if where := kill_at(ranks, cut, draw, inside):
            counts[where] += 1
        codes = finish(ranks, timeout=60)
        assert all(code in (0, 1, -signal.SIGKILL) for code in codes), codes
        if codes == [0, 0]:
            break
    assert finish(start(run_argv(cut, more, how, f"--load {cut}"), tmp_path / "cut.log")) == [0, 0]
    assert metrics_of(cut) == metrics_of(whole)
    assert [line["iteration"] for line in metrics_of(cut)] == list(range(1, iterations + 1))
    last = f"iter_{iterations:07d}"
    assert files_of(cut / last) == files_of(whole / last) != {}
    assert not saving(cut)
    return counts


@pytest.mark.slow
def test_three_kills(run_argv, tmp_path):
    """Of a run that saves in the background; the one beside it saves in the step."""
    assert sum(kill_and_resume(run_argv, tmp_path, 3, 20, "--async-save").values()) == 3


@pytest.mark.full
@pytest.mark.parametrize("part", range(8))
def test_two_hundred_kills(run_argv, tmp_path, part):
    counts = kill_and_resume(run_argv, tmp_path, 25, 120 + part)
    print(counts)
    assert sum(counts.values()) == 25 and counts["inside a save"] >= 3


@pytest.mark.full
@pytest.mark.parametrize("part", range(4))
def test_a_hundred_kills_of_background_saves(run_argv, tmp_path, part):
    counts = kill_and_resume(run_argv, tmp_path, 25, 220 + part, "--async-save")
    print(counts)
    assert sum(counts.values()) == 25 and counts["inside a save"] >= 3
