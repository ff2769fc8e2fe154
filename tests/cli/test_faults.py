"""Real jobs under torchrun whose processes are stopped and killed: who it was is told, and none is left.

The whole matrix is in the full run; the default one has a case of each kind.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vlm.processes import children, state
from megatron_vlm.testing.runs import write_shards
from tests.examples.shell import free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    """A twin and its data."""
    from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2

    folder = tmp_path_factory.mktemp("faults")
    write_tiny_idefics2(folder / "twin", layers=2)
    return folder / "twin", write_shards(folder / "data", 24, seed=3)


class Job:
    """``megatron-vlm train`` on two ranks under torchrun; everything it started ends with the test."""

    def __init__(self, inputs: tuple[Path, Path], out: Path, more: str = "", timeout: float | None = 4.0):
        self.out, (twin, data) = out, inputs
        words = (
            f"--load {twin} --data-path {data} --seq-length 96 --global-batch-size 4 --lr 1e-3 --shortest-edge 24 "
            f"--num-workers 1 --device cpu --no-tensorboard --output-dir {out} --save {out} --train-iters 100000 {more}"
        ).split()
        if timeout is not None:
            words += [f"parallel.heartbeat_timeout_seconds={timeout}", "parallel.start_timeout_seconds=15"]
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
        command = [sys.executable, *torchrun, "--master-addr", "127.0.0.1", "-m", "megatron_vlm", "train", *words]
        self.log = out.with_suffix(".log")
        with self.log.open("wb") as log:
            self.agent = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.all: set[int] = set()

    def look(self) -> None:
        """Remembers every process of the job that there is now."""
        known = [self.agent.pid]
        while known:
            self.all.add(known[-1])
            known += children(known.pop())

    def ranks(self) -> list[int]:
        """Processes of rank 0 and 1, once each says by its environment which it is: numbers of processes start anew one day."""
        found = {}
        for pid in children(self.agent.pid):
            with contextlib.suppress(OSError):
                match = re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
                if match:
                    found[int(match[1])] = pid
        return [found[rank] for rank in sorted(found)]

    def wait_for(self, what, seconds: float = 180):
        """Waits until ``what()`` is true, and returns it."""
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < deadline and self.agent.poll() is None, self.text()
            self.look()
            time.sleep(0.02)
        self.look()
        return found

    def wait_for_lines(self, lines: int, word: str = "") -> None:
        path = self.out / "metrics.jsonl"
        self.wait_for(lambda: path.exists() and sum(word in line for line in path.read_text().splitlines()) >= lines)

    def alive(self) -> list[int]:
        return [pid for pid in self.all if state(pid) not in ("", "Z")]

    def wait_for_nobody(self, seconds: float) -> float:
        """Waits until no process is left; returns the seconds it took."""
        began = time.monotonic()
        while self.alive():
            self.agent.poll()
            assert time.monotonic() - began < seconds, f"{self.alive()} are left\n{self.text()}"
            time.sleep(0.05)
        return time.monotonic() - began

    def text(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.look()
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
        self.agent.wait()


LAYOUTS = {
    "tp 2": "--tensor-model-parallel-size 2",
    "pp 2": "--pipeline-model-parallel-size 2",
    "dp 2": "--use-distributed-optimizer",
}


def bring_to(job: Job, when: str) -> None:
    """Waits until the job is where the fault shall strike."""
    if when == "start":
        job.wait_for(lambda: len(job.ranks()) == 2)
        time.sleep(4)  # somewhere in the imports
    elif when == "step":
        job.wait_for_lines(4)
    elif when == "save":
        job.wait_for(lambda: len(list(job.out.glob("iter_*.tmp-*"))) and (job.out / "metrics.jsonl").exists())
    else:
        job.wait_for_lines(1, "eval_loss")
        job.wait_for_lines(4)


def options(when: str, layout: str, inputs: tuple[Path, Path]) -> str:
    more = {"save": "--save-interval 1 --keep-last 2", "evaluation": f"--eval-interval 1 --valid-data-path {inputs[1]}"}
    return f"{more.get(when, '')} {LAYOUTS[layout]}"


def strike(job: Job, what: str, victim: str) -> int:
    """Sends the signal; returns the process."""
    ranks = job.ranks()
    workers = [
        pid for rank in ranks for pid in children(rank) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    pid = {"agent": job.agent.pid, "rank 0": ranks[0], "rank 1": ranks[-1], "worker": (workers or ranks)[0]}[victim]
    os.kill(pid, getattr(signal, what))
    return pid


def check(
    inputs, out: Path, what: str, victim: str, when: str, layout: str, timeout: float | None = 4.0, bound: float = 60
) -> None:
    with Job(inputs, out, options(when, layout, inputs), timeout) as job:
        bring_to(job, when)
        pid = strike(job, what, victim)
        took = job.wait_for_nobody(60)
        text = job.text()
    print(f"{what} {victim} in {when}, {layout}: ended after {took:.1f} s")
    if victim == "agent":
        assert when == "start" or "torchrun" in text, text
    elif when != "start":
        who = (
            rf"data worker {pid} "
            if victim == "worker"
            else rf"rank {victim[-1]} \((process {pid} on|local_rank|pid: {pid})"
        )
        assert re.search(who, text) or (what == "SIGKILL" and f"pid: {pid}" in text), text
        assert f'File "{ROOT}/megatron_vlm' not in text, text  # a traceback of ours; torchrun's own is its affair
    if what == "SIGSTOP" and victim.startswith("rank") and when != "start":
        other = 1 - int(victim[-1])
        assert (out / "stacks" / f"rank-{other}.txt").stat().st_size > 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "victim", "when", "layout"),
    [
        ("SIGKILL", "agent", "step", "dp 2"),
    ],
    ids=lambda value: value.replace(" ", "_"),
)
def test_a_fault_ends_all_and_is_told(inputs, tmp_path, what, victim, when, layout):
    check(inputs, tmp_path / "out", what, victim, when, layout)


MATRIX = [
    (what, victim, when, layout)
    for what in ("SIGSTOP", "SIGKILL")
    for victim in ("rank 0", "rank 1", "worker", "agent")
    for when in ("start", "step", "save", "evaluation")
    for layout in LAYOUTS
    if not (what == "SIGSTOP" and victim == "agent") and not (victim == "worker" and when == "start")
]


@pytest.mark.full
@pytest.mark.parametrize(("what", "victim", "when", "layout"), MATRIX, ids=lambda value: value.replace(" ", "_"))
def test_the_matrix_of_faults(inputs, tmp_path, what, victim, when, layout):
    check(inputs, tmp_path / "out", what, victim, when, layout)


@pytest.mark.full
def test_a_stopped_rank_at_the_default_setting(inputs, tmp_path):
    check(inputs, tmp_path / "out", "SIGSTOP", "rank 1", "step", "tp 2", timeout=None)
