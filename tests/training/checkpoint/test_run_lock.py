"""One run at a time in a folder: who lives keeps it, who is dead does not, wherever it ran."""

import json
import os
import subprocess
import sys
import time

import pytest

from megatron_vlm.errors import CheckpointError, ConfigError
from megatron_vlm.processes import Identity
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.runs import metrics_of, train
from megatron_vlm.training.checkpoint.run_lock import LOCK, RunLock, holder

HOLD = """
import sys, time
from pathlib import Path
from megatron_vlm.training.checkpoint.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def elsewhere(folder, **changes):
    """A lock of another host."""
    folder.mkdir(exist_ok=True)
    content = {**Identity.of().to_dict(), "host": "node7", "since": "2026-01-01 00:00:00", "token": "x", **changes}
    (folder / LOCK).write_text(json.dumps(content))


def test_a_living_run_keeps_its_folder_and_a_killed_one_does_not(tmp_path, capsys):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    expected = rf"is in use by process {process.pid} on {os.uname().nodename} \(since .*remove .*run\.lock"
    with pytest.raises(ConfigError, match=expected):
        RunLock(tmp_path)
    assert holder(tmp_path).startswith(f"process {process.pid} on")
    process.kill()
    process.wait()
    assert holder(tmp_path) is None
    lock = RunLock(tmp_path)
    lock.check()
    lock.close()
    assert not list(tmp_path.iterdir()) and holder(tmp_path) is None


def test_a_number_that_was_used_again_holds_nothing(tmp_path):
    me = Identity.of()
    elsewhere(tmp_path, host=me.host, start=me.start - 1)
    RunLock(tmp_path).close()
    elsewhere(tmp_path, host=me.host)  # this very process
    with pytest.raises(ConfigError, match="is in use by"):
        RunLock(tmp_path)


def test_a_run_elsewhere_is_told_by_its_time_stamp(tmp_path):
    elsewhere(tmp_path)
    began = time.monotonic()
    lock = RunLock(tmp_path, interval=0.2)  # it stands still
    assert 0.8 <= time.monotonic() - began < 10
    first = (tmp_path / LOCK).stat().st_mtime_ns
    deadline = time.monotonic() + 10
    while (tmp_path / LOCK).stat().st_mtime_ns == first:  # ours moves
        assert time.monotonic() < deadline
        time.sleep(0.05)
    content = json.loads((tmp_path / LOCK).read_text())
    os.utime(tmp_path / LOCK)
    lock._closed.set()
    (tmp_path / LOCK).write_text(json.dumps({**content, "host": "node7"}))
    code = "import os, sys, time\nfor _ in range(200): os.utime(sys.argv[1]); time.sleep(0.05)\n"  # it lives
    mover = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / LOCK)])
    try:
        with pytest.raises(ConfigError, match=r"is in use by process \d+ on node7"):
            RunLock(tmp_path, interval=1.0)
    finally:
        mover.kill()
        mover.wait()


def test_who_lost_its_folder_writes_no_more(tmp_path):
    lock = RunLock(tmp_path)
    elsewhere(tmp_path, token="y")
    with pytest.raises(CheckpointError, match="was taken over by process"):
        lock.check()
    lock.close()
    assert (tmp_path / LOCK).exists()  # the other's


def train_while_held(argv: list[str], folder: str, held: bool) -> tuple[int, str]:
    """Trains, on every rank, while this process's rank 0 holds the folder as another run."""
    from pathlib import Path

    lock = RunLock(Path(folder)) if held and os.environ["RANK"] == "0" else None
    try:
        return train(argv)
    finally:
        if lock is not None:
            lock.close()


def test_two_runs_in_one_folder(command, tmp_path):
    """The second ends on every rank, before it touches a file of the first; afterwards it runs."""
    out = tmp_path / "out"
    argv = command("out", f"--save {out} --train-iters 2 --save-interval 1")
    assert run_distributed(train_while_held, argv, str(out), False, dp=2) == [(0, "")] * 2
    left = sorted(path.name for path in out.iterdir())
    assert LOCK not in left
    (out / "iter_0000003.tmp-abcdef").mkdir()  # what the other run writes now
    answers = run_distributed(train_while_held, argv, str(out), True, dp=2)
    assert [code for code, _ in answers] == [1, 1] and all("is in use by process" in text for _, text in answers)
    assert (out / "iter_0000003.tmp-abcdef").is_dir() and len(metrics_of(out)) == 2
    argv += f"--load {out} --train-iters 3".split()
    assert run_distributed(train_while_held, argv, str(out), False, dp=2) == [(0, "")] * 2
