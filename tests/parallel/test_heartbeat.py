"""Ranks that stop, die, fail or never come are named in seconds, and everyone ends; slow ones are waited for."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from megatron_vlm.testing.distributed import forkserver
from tests.examples.shell import free_port

TIMEOUT = 3.0


def rank(number: int, world: int, port: int, folder: str, kind: str) -> None:
    """One rank of a job: joins, then adds up numbers together with the others until ``folder/stop`` is there."""
    import torch
    import torch.distributed as dist

    from megatron_vlm.cli.main import _leave
    from megatron_vlm.errors import MegatronVLMError
    from megatron_vlm.parallel.heartbeat import Heartbeat
    from megatron_vlm.parallel.topology import init_process_group

    os.setsid()
    out = os.open(f"{folder}/out.{number}", os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(out, 1), os.dup2(out, 2)
    os.environ.update(RANK=str(number), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    exchange = Heartbeat._exchange

    def slow_exchange(self):
        exchange(self)
        time.sleep(0.3)

    if kind == "slow":
        Heartbeat._exchange = slow_exchange
    try:
        with Heartbeat(timeout=TIMEOUT) as heartbeat:
            heartbeat.folder = Path(folder)
            init_process_group(torch.device("cpu"), 30.0, heartbeat, start_timeout=TIMEOUT)
            for step in range(10**9):
                heartbeat.at("step", step)
                Path(folder, f"at.{number}").write_text(str(step))
                if kind == "slow" and step == 2 and number == 1:
                    time.sleep(2 * TIMEOUT)
                if kind == "fails" and step == 2 and number == 1:
                    raise MegatronVLMError("disk on fire")
                total = torch.tensor([int(Path(folder, "stop").exists())])
                dist.all_reduce(total)
                if int(total):
                    break
                time.sleep(0.02)
        if any(thread.name == "heartbeat" for thread in threading.enumerate()):
            os._exit(7)  # it may be inside torch's store when Python ends
    except MegatronVLMError as error:
        if not getattr(error, "echo", False):
            os.write(2, f"error: {error}\n".encode())
        _leave(1)
        os._exit(1)


class Job:
    """Some ranks as processes, which end with the test."""

    def __init__(self, folder: Path, world: int, kind: str = "", absent: int | None = None):
        self.folder, port = folder, free_port()
        numbers = [number for number in range(world) if number != absent]
        self.ranks = {
            number: forkserver().Process(target=rank, args=(number, world, port, str(folder), kind))
            for number in numbers
        }
        for process in self.ranks.values():
            process.start()

    def wait_for_steps(self, steps: int) -> None:
        deadline = time.monotonic() + 60
        paths = [self.folder / f"at.{number}" for number in self.ranks]
        while any(int((path.exists() and path.read_text()) or 0) < steps for path in paths):
            assert time.monotonic() < deadline and all(p.is_alive() for p in self.ranks.values()), self.output()
            time.sleep(0.02)

    def codes(self, seconds: float) -> list[int | None]:
        deadline = time.monotonic() + seconds
        for process in self.ranks.values():
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.ranks.values()]

    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("out.*")))

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ranks.values():
            process.kill()
            process.join()


@pytest.mark.parametrize("lost", [1, 0], ids=["another", "the one that keeps the store"])
def test_a_stopped_rank_is_named_and_all_end(tmp_path, lost):
    with Job(tmp_path, 3) as job:
        job.wait_for_steps(40)
        os.kill(job.ranks[lost].pid, signal.SIGSTOP)
        assert job.codes(20) == [-signal.SIGKILL if number == lost else 1 for number in range(3)], job.output()
        text = job.output()
    told = [line for line in text.splitlines() if "error: " in line and "[c10d]" not in line]
    assert len(told) == 1 and "no sign of life: " in told[0], text
    assert f"(process {job.ranks[lost].pid} on {os.uname().nodename}" in text
    assert f"rank {lost} (" in text and "last in phase step, iteration " in text, text
    for number in {0, 1, 2} - {lost}:
        stacks = (tmp_path / "stacks" / f"rank-{number}.txt").read_text()
        assert "test_heartbeat.py" in stacks and "all_reduce" in stacks and "no sign of life" in stacks
    assert not (tmp_path / "stacks" / f"rank-{lost}.txt").exists()


@pytest.mark.parametrize("lost", [1, 0])
def test_a_killed_rank_is_named(tmp_path, lost):
    with Job(tmp_path, 3) as job:
        job.wait_for_steps(40)
        began = time.monotonic()
        os.kill(job.ranks[lost].pid, signal.SIGKILL)
        assert job.codes(20) == [-signal.SIGKILL if number == lost else 1 for number in range(3)], job.output()
        assert time.monotonic() - began < 15
    assert f"rank {lost} (process {job.ranks[lost].pid} on" in job.output(), job.output()
    assert "ended without a word: killed (for want of memory?), or crashed" in job.output()


def test_a_rank_that_fails_is_told_by_the_others(tmp_path):
    with Job(tmp_path, 2, "fails") as job:
        assert job.codes(30) == [1, 1], job.output()
    assert "error: disk on fire" in (tmp_path / "out.1").read_text()
    assert f"rank 1 (process {job.ranks[1].pid} on" in (tmp_path / "out.0").read_text(), job.output()
    assert "ended with an error: disk on fire" in (tmp_path / "out.0").read_text()


def test_a_slow_rank_is_waited_for_and_a_good_end_is_quick(tmp_path):
    with Job(tmp_path, 2, "slow") as job:
        job.wait_for_steps(4)
        (tmp_path / "stop").touch()
        began = time.monotonic()
        assert job.codes(20) == [0, 0], job.output()
        assert time.monotonic() - began < 5
    assert not job.output().strip() and not (tmp_path / "stacks").exists()


@pytest.mark.parametrize("absent", [1, pytest.param(0, marks=pytest.mark.full)])
def test_a_rank_that_never_came_is_named(tmp_path, absent):
    with Job(tmp_path, 2, absent=absent) as job:
        assert job.codes(65) == [1], job.output()
    if absent:
        assert "rank 1 of 2 did not come to rank 0 at 127.0.0.1:" in job.output()
        assert "parallel.start_timeout_seconds waits longer" in job.output()
    else:
        assert "rank 0 at 127.0.0.1:" in job.output() and "does not answer" in job.output()
