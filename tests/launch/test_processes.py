"""Processes: told by the environment, started once, stopped with their work saved."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.launch import processes
from megatron_vlm.training.stop import StopSignal
from tests.examples.shell import free_port

SLURM = {"SLURM_JOB_ID": "71234", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "gpu[03-05,09],login"}


def test_nobody_started_us():
    job = processes.find_job_rank({"PATH": "/bin"})
    assert job.alone and not job.environment


def test_torchrun_started_us():
    job = processes.find_job_rank({"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    assert (job.rank, job.world, job.alone) == (3, 8, False)
    with pytest.raises(ConfigError, match="MASTER_ADDR, MASTER_PORT are not"):
        processes.find_job_rank({"RANK": "3", "WORLD_SIZE": "8"})


def test_slurm_started_us():
    job = processes.find_job_rank({**SLURM, "SLURM_PROCID": "5", "SLURM_LOCALID": "1"})
    assert (job.rank, job.world, job.by) == (5, 8, "Slurm")
    expected = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03", "MASTER_PORT": "31234"}
    assert job.environment == expected
    # Slurm's shell without a task of ours: one process, and no torchrun.
    for environment in ({"SLURM_JOB_ID": "7"}, {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}):
        job = processes.find_job_rank(environment)
        assert (job.world, job.alone) == (1, False)


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("a-2,b", "a-2"), ("gpu[03-05]", "gpu03"), ("x[7]-ib", "x7")]
)
def test_first_host(nodes, first):
    assert processes.first_host(nodes) == first


def test_environment_keeps_what_is_set(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    made = processes.environment_of(processes.find_job_rank({}), ("2", "0"), 2)
    assert made["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
    assert made["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert made["CUDA_VISIBLE_DEVICES"] == "2,0"


CHILD = """
import signal, sys, time
def stop(number, frame):
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_run_save(number, capfd):
    """Ctrl-C reaches the child as SIGTERM, once, and its exit code comes back."""
    run = processes.RunProcess([sys.executable, "-c", CHILD], os.environ)
    ready = threading.Event()

    def look() -> None:
        if "ready" in capfd.readouterr().out and not ready.is_set():
            ready.set()
            os.kill(os.getpid(), number)

    previous = signal.getsignal(signal.SIGINT)
    code = run.wait(look)
    assert code == 143 and run.stopped
    assert "saved" in capfd.readouterr().out
    assert signal.getsignal(number) is not run._forward and previous is not None


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, __file__, "rank"], start_new_session=True)
else:
    print("rank", os.getpid(), flush=True)
time.sleep(60)
"""


def test_ctrl_c_once_more_stops_at_once(tmp_path, capfd, monkeypatch):
    """Also a rank, which torchrun puts in a session of its own."""
    monkeypatch.setattr(StopSignal, "AGAIN_SECONDS", 0.0)
    (tmp_path / "run.py").write_text(STUBBORN)
    run, ranks = processes.RunProcess([sys.executable, str(tmp_path / "run.py")], os.environ), []

    def look() -> None:
        ranks.extend(int(word) for word in re.findall(r"rank (\d+)", capfd.readouterr().out))
        if ranks:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    assert run.wait(look) == 128 + signal.SIGKILL
    assert not psutil.pid_exists(ranks[0]) or psutil.Process(ranks[0]).status() == psutil.STATUS_ZOMBIE


def test_a_killed_launch_leaves_no_run_behind(tmp_path):
    code = (
        "import os, sys; from megatron_vlm.launch.processes import RunProcess\n"
        f"run = RunProcess([sys.executable, '-c', {CHILD!r}], os.environ)\n"
        "print(run.process.pid, flush=True)\nrun.wait(lambda: None)"
    )
    with (tmp_path / "out").open("wb") as out:
        parent = subprocess.Popen([sys.executable, "-c", code], stdout=out)
    while "ready" not in (text := (tmp_path / "out").read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    child = int(next(line for line in text.splitlines() if line.isdecimal()))
    parent.kill()
    parent.wait()
    for _ in range(200):
        if "saved" in (tmp_path / "out").read_text():
            break
        time.sleep(0.05)
    assert "saved" in (tmp_path / "out").read_text(), f"process {child} still runs"


SHARE = """
import os, sys, time
from megatron_vlm.launch.processes import find_job_rank, prepared_once
job = find_job_rank(os.environ)
with prepared_once(job) as share:
    if job.rank == 0:
        time.sleep(0.5)
        if sys.argv[1] == "fails":
            raise SystemExit(1)
        print(0, share("folder"))
    else:
        print(job.rank, share(None) or "nothing")
"""


@pytest.mark.full
@pytest.mark.parametrize(("case", "expected"), [("works", "folder"), ("fails", "nothing")])
def test_ranks_wait_for_the_first(case, expected):
    """Without torchrun's store: rank 0 keeps one until all have read; a failure reaches everyone."""
    port, ranks = str(free_port()), []
    for rank in ("1", "0"):
        names = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", SHARE, case]
        ranks.append(subprocess.Popen(command, env={**os.environ, **names}, stdout=subprocess.PIPE, text=True))
    texts = [process.communicate(timeout=60)[0] for process in ranks]
    assert texts[0] == f"1 {expected}\n"
