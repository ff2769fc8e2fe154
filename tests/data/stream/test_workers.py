"""Workers: rows come in order, what is made ahead stays within its bounds, and a worker's end or error is told."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.row import Row
from megatron_vlm.data.stream import workers
from megatron_vlm.data.stream.reader import Fetched
from megatron_vlm.data.stream.step_plan import RowPlan
from megatron_vlm.data.stream.workers import RowWorkers
from megatron_vlm.errors import TrainingError
from megatron_vlm.processes import state

MIB = 2**20


class Maker:
    """Makes rows of ``mib`` MiB of pixels and leaves a file for each; odd ones take longer; 50 takes long; plan 99 is a bug."""

    def __init__(self, folder, mib):
        self.folder, self.mib = folder, mib

    def __getitem__(self, plan):
        number = plan.ids[0]
        if number == 99:
            raise KeyError("a bug")
        time.sleep(1.5 if number == 50 else 0.02 * (number % 2))
        Path(self.folder, str(number)).touch()
        ids = torch.tensor([number])
        pixels = (torch.full((1, self.mib * MIB // 4, 1), float(number)),)
        return Fetched(row=Row.of({"input_ids": ids, "position_ids": ids, "labels": ids}, [len(ids)], pixels=pixels))


def plans_of(numbers):
    return (RowPlan(ids=(n,), tokens=(1,), epoch=0) for n in numbers)


def test_a_signal_to_the_whole_job_spares_workers_that_are_still_starting(tmp_path):
    """A scheduler's SIGTERM, a Ctrl-C: the parent still needs rows to finish its step."""
    rows = RowWorkers(Maker(tmp_path, 1), plans_of(range(9)), one_worker(2))
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(rows._workers[0].pid, number)
    assert [next(rows).row.input_ids.tolist() for _ in range(9)] == [[n] for n in range(9)]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    rows.close()


@pytest.mark.parametrize(
    "mib, bound, ahead",
    [(2, 8, 4), *(pytest.param(*case, marks=pytest.mark.full) for case in ((1, 1000, 12), (16, 8, 1)))],
)
def test_rows_ahead_are_bounded_by_bytes_and_by_number(tmp_path, mib, bound, ahead):
    config = DataConfig(seq_length=8, num_workers=2, prefetch_rows=6, prefetch_mb=bound)
    rows = RowWorkers(Maker(tmp_path, mib), plans_of(range(24)), config)
    made = []
    for number in range(20):
        item = next(rows)
        assert item.row.input_ids.tolist() == [number] and float(item.row.pixels[0][0, -1, 0]) == number
        if number in (4, 9):
            time.sleep(1.0)
            made.append(len(list(tmp_path.iterdir())) - number - 1)
    assert ahead - 1 <= max(made) <= ahead, made
    assert [item.row.input_ids.item() for item in rows] == [20, 21, 22, 23]
    rows.close()


@pytest.mark.parametrize(
    "told, bound, most", [(None, 128, 32), pytest.param(None, 24, 24, marks=pytest.mark.full), (2, 128, 2)]
)
def test_a_step_of_many_rows_has_them_made_while_the_one_before_runs(tmp_path, monkeypatch, told, bound, most):
    """Steps of 20 rows: what workers have ready grows to what a step takes, and no further, nor above a
    bound; a number that is told stays."""
    monkeypatch.setattr(workers, "_MOST_ROWS", bound)
    config = DataConfig(seq_length=8, num_workers=1, prefetch_rows=told)
    rows, ready = RowWorkers(Maker(tmp_path, 0), plans_of(range(101, 401, 2)), config), []
    for _ in range(6):
        for _ in range(20):
            next(rows)
        deadline = time.monotonic() + 10
        while len(list(tmp_path.iterdir())) < rows._sent and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.1)  # the step
        ready.append(rows._sent - rows._taken)
    rows.close()
    assert ready[-1] == min(most, 30) and rows._most_rows == most, ready


def test_a_bug_is_told(tmp_path):
    config = DataConfig(seq_length=8, num_workers=1, prefetch_rows=1)
    rows = RowWorkers(Maker(tmp_path, 1), plans_of([0, 99, 1, 2, 3]), config)
    next(rows)
    with pytest.raises(RuntimeError, match="a bug"):
        next(rows)
    rows.close()


@pytest.mark.parametrize("made", [True, False], ids=["rows waiting", "in a row"])
def test_a_killed_worker_is_told(tmp_path, made):
    """Also where a row of it waits, whose memory it holds: to fetch that fails, which told nothing of the worker."""
    rows = RowWorkers(Maker(tmp_path, 1), plans_of([0, 1, *[2, 4, 6, 8] * (not made)] + [2] * 30), one_worker(3))
    next(rows)
    if made:
        time.sleep(0.5)
    os.kill(rows._workers[0].pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(TrainingError, match=r"data worker \d+ ended with exit code -9; killed for want of memory"):
        list(rows)
    assert time.monotonic() - began < 10
    rows.close()


@pytest.mark.parametrize("made", [True, False], ids=["rows waiting", "in a row"])
def test_a_stopped_worker_is_found_and_a_slow_one_is_not(tmp_path, monkeypatch, made):
    monkeypatch.setattr(workers, "_STOPPED_SECONDS", 1.0)
    rows = RowWorkers(Maker(tmp_path, 1), plans_of([0, 50, *range(1, 30)]), one_worker(3))
    assert [next(rows).row.input_ids.item() for _ in range(2)] == [0, 50]  # 50 takes 1.5 s
    if made:
        time.sleep(0.5)
    worker = rows._workers[0]
    os.kill(worker.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(TrainingError, match=rf"data worker {worker.pid} was stopped by a signal and did not go on for"):
        list(rows)
    assert time.monotonic() - began < 10
    worker.join(10)
    assert worker.exitcode == -signal.SIGKILL
    rows.close()


def one_worker(rows):
    return DataConfig(seq_length=8, num_workers=1, prefetch_rows=rows)


def test_even_a_stopped_worker_ends_with_its_parent(tmp_path):
    code = (
        "import os, signal, sys, time; sys.path.insert(0, sys.argv[1]); from test_workers import *\n"
        "if __name__ == '__main__':\n"
        "    rows = RowWorkers(Maker(sys.argv[2], 1), plans_of(range(9)), one_worker(2)); next(rows)\n"
        "    os.kill(rows._workers[0].pid, signal.SIGSTOP); print(rows._workers[0].pid, flush=True); os._exit(0)"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    words = [sys.executable, str(script), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 10
    while state(int(done.stdout)) not in ("", "Z"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
