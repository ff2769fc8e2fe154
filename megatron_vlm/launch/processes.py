"""Processes of a run: where this one stands among them, how the others are started, and how a signal reaches them.

    nobody started us    one rank: python -m megatron_vlm train        several: torchrun ... -m megatron_vlm train
    torchrun, srun, mpi  we are one rank (RANK, or Slurm's variables): rank 0 prepares, all others wait, each trains

The run is always a child, so that this process, which never touches a GPU, saves and exports around it.
"""

import contextlib
import datetime
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from megatron_vlm.errors import ConfigError
from megatron_vlm.processes import signal_with_parent
from megatron_vlm.training.stop import StopSignal

SAVE_SECONDS = 120
"""What a run may take to finish its step and save after a signal, before torchrun kills it; torchrun's own 30 are few."""
_PREPARE_HOURS = 24
_POLL_SECONDS = 0.2
_WATCH_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class JobRank:
    """Where this process stands.

    Attributes:
        rank, world: of the whole run; world 0: nobody started the run's processes, we do.
        environment: variables that torch.distributed reads, where a scheduler set others.
        by: who started us, in words.
    """

    rank: int = 0
    world: int = 0
    environment: Mapping[str, str]
    by: str = ""

    @property
    def alone(self) -> bool:
        """We start the processes."""
        return not self.world


def find_job_rank(environment: Mapping[str, str]) -> JobRank:
    """Reads RANK, or Slurm's variables.

    Raises:
        ConfigError: RANK without what goes with it.
    """
    if "RANK" in environment:
        absent = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
        world = int(environment.get("WORLD_SIZE", "1"))
        if absent and world > 1:
            raise ConfigError(
                f"RANK is set, {', '.join(absent)} are not: whoever starts the ranks sets them all, or none"
            )
        return JobRank(rank=int(environment["RANK"]), world=world, environment={}, by="RANK")
    job = environment.get("SLURM_JOB_ID")
    if job is None and "SLURM_PROCID" not in environment:
        return JobRank(environment={})
    world = int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")))
    if "SLURM_PROCID" not in environment or world == 1:
        return JobRank(rank=0, world=1, environment={}, by="Slurm")
    rank, local = environment["SLURM_PROCID"], environment.get("SLURM_LOCALID", "0")
    made = {
        "RANK": rank,
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": local,
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_JOB_NODELIST", "127.0.0.1")),
        # A port of this job's own, so that two jobs that share a first node do not meet.
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20000 + int(job or 0) % 20000),
    }
    return JobRank(rank=int(rank), world=world, environment=made, by="Slurm")


def first_host(nodes: str) -> str:
    """First name of Slurm's list: ``gpu[03-05,09],login`` -> ``gpu03``."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    return (match[1] + (match[2] or "")) if match else nodes


@contextlib.contextmanager
def prepared_once(job: JobRank) -> Iterator[Callable[[str | None], str]]:
    """Gives ``share``: rank 0 calls it with what it made, the others with None, and all return rank 0's text.

    An empty text says that rank 0 failed. The store is torch's own rendezvous; rank 0 keeps it until all have read.
    """
    if job.world <= 1:
        yield lambda text: text or ""
        return
    from torch.distributed import rendezvous

    os.environ.update(job.environment)
    store, rank, world = next(iter(rendezvous("env://", timeout=datetime.timedelta(minutes=10))))
    key = f"megatron_vlm_launch_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    told = False

    def share(text: str | None) -> str:
        nonlocal told
        told = True
        if rank == 0:
            store.set(key, text or " ")
        else:
            store.wait([key], datetime.timedelta(hours=_PREPARE_HOURS))
        shared = store.get(key).decode().strip()
        store.add(f"{key}_read", 1)
        while rank == 0 and store.add(f"{key}_read", 0) < world:  # it may be ours to keep the store alive
            time.sleep(_POLL_SECONDS)
        return shared

    try:
        yield share
    finally:
        if rank == 0 and not told:
            share("")


def command(config: Path, ranks: int, port: int) -> list[str]:
    """What trains: this Python, or torchrun where there are several ranks to start."""
    train = ["-m", "megatron_vlm", "train", "--config", str(config)]
    if ranks == 1:
        return [sys.executable, *train]
    torchrun = [sys.executable, "-m", "megatron_vlm.launch.agent", "--nnodes", "1", "--nproc-per-node", str(ranks)]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(port), "--shutdown-timeout", str(SAVE_SECONDS)]
    return [*torchrun, *train]


def environment_of(job: JobRank, gpus: Sequence[str], ranks: int) -> dict[str, str]:
    """Environment of the run: what is set stays."""
    made = {**os.environ, **job.environment}
    made.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # overlapped communication wants launches in order
    made.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    made.setdefault("TOKENIZERS_PARALLELISM", "false")
    if ranks > 1:
        made.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if gpus:
        made["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    root = str(Path(__file__).resolve().parents[2])  # a checkout that is not installed
    made["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([root, *filter(None, [made.get("PYTHONPATH")])]))
    return made


class RunProcess:
    """The child, in a session of its own: Ctrl-C reaches this process alone, which asks the child to save and stop."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]):
        self._stops, self._asked = 0, 0.0
        self._previous: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            self._previous[number] = signal.signal(number, self._forward)
        self.process = subprocess.Popen(
            words, env=dict(environment), start_new_session=True, preexec_fn=_end_with_parent
        )

    def wait(self, every: Callable[[], None]) -> int:
        """Waits for the end, calling ``every`` meanwhile; returns the exit code, a signal's as 128 + its number."""
        try:
            while self.process.poll() is None:
                every()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(_WATCH_SECONDS)
        finally:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
        code = self.process.returncode
        return 128 - code if code < 0 else code

    @property
    def stopped(self) -> bool:
        """A signal asked the run to stop."""
        return bool(self._stops)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._stops += 1
        if self._stops == 1:
            self._asked = time.monotonic()
            print("stopping: the run finishes its step and saves; Ctrl-C once more stops it at once", flush=True)
        again = number == signal.SIGINT and time.monotonic() - self._asked > StopSignal.AGAIN_SECONDS
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if not again:  # torchrun and srun may repeat themselves
                self.process.send_signal(signal.SIGTERM)
                return
            child = psutil.Process(self.process.pid)
            for process in [*child.children(recursive=True), child]:  # ranks are in sessions of their own
                process.kill()


def _end_with_parent() -> None:
    """A killed launch leaves no run behind: the kernel sends SIGTERM, which saves first."""
    signal_with_parent(signal.SIGTERM)
