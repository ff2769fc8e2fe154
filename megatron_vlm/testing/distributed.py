"""A pool of gloo CPU ranks for tests: ``run_distributed(fn, *args, tp=2, pp=2)`` runs ``fn`` on tp x pp x dp ranks.

    parent --pickled (module, function, args)--> worker 0..world-1 --pickled result or traceback--> parent

Importing megatron-core costs seconds, so workers are forked from a server that has imported it, and live until the
parent exits. The process group is rebuilt when the world size changes. A rank that raises, dies or outlives the
deadline is reported by number with its traceback (or the tail of its output), and ranks that cannot be used again are
killed with their children and replaced.
"""

import atexit
import contextlib
import datetime
import faulthandler
import fcntl
import functools
import gc
import importlib
import importlib.util
import io
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from megatron_vlm.parallel.grid import Grid

MAX_RANKS = 8
PRELOAD = (
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.models.gpt",
    "megatron.core.pipeline_parallel",
    "transformers.models.idefics2.configuration_idefics2",
    "megatron_vlm.training.trainer",
    "megatron_vlm.testing.parity",
)
"""What most functions need; imported once, by the server that forks the ranks."""
START_SECONDS = 180.0
"""A worker that has not imported megatron-core by then is given up."""
GRACE_SECONDS = 15.0
"""After one rank failed, the others have this long to finish or fail before they are killed."""
SEED = 1234


class RankError(RuntimeError):
    """One or more ranks failed; the message holds each one's traceback, the first to fail first.

    Attributes:
        ranks: numbers of the failing ranks, in the order they failed.
    """

    def __init__(self, message: str, ranks: tuple[int, ...]):
        super().__init__(message)
        self.ranks = ranks


def run_distributed(
    fn: Callable[..., Any],
    *args: Any,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    cp: int = 1,
    timeout: float = 120,
    **kwargs: Any,
) -> list[Any]:
    """Runs ``fn(*args, **kwargs)`` on ``tp * pp * dp * cp`` gloo ranks and returns their results in rank order.

    On each rank the CPU seams of megatron-core are installed, a process group of that world size exists, torch has one
    thread and every generator starts from the same seed. ``fn`` builds its own Topology; it is destroyed afterwards.

    Args:
        fn: a module-level function; it, its arguments and its results travel by pickle (tensors by value).
        tp, pp, dp, cp: only their product matters here.
        timeout: seconds for the call, without starting workers.

    Raises:
        RankError: a rank raised, died, or was not done in time.
    """
    world = Grid(tp=tp, cp=cp, dp=dp, pp=pp).world
    if not 1 <= world <= MAX_RANKS:
        raise ValueError(f"tp {tp} x pp {pp} x dp {dp} x cp {cp} = {world} ranks, but the pool has {MAX_RANKS}")
    return _pool().run(world, fn, args, kwargs, timeout)


def run_alone(fn: Callable[..., Any], *args: Any, timeout: float = 120) -> Any:
    """Runs ``fn(*args)`` in a process without a process group, the CPU seams of megatron-core installed.

    Raises:
        RankError: it raised, died, or was not done in time.
    """
    mine, theirs = multiprocessing.Pipe(duplex=False)
    where = (fn.__module__, str(sys.modules[fn.__module__].__file__), fn.__qualname__, sys.path)
    process = forkserver().Process(target=_alone, args=(theirs, where, pickle.dumps((args, {}))), daemon=True)
    process.start()
    theirs.close()
    try:
        good, answer = pickle.loads(mine.recv_bytes()) if mine.poll(timeout) else (False, f"no answer in {timeout:g} s")
    except EOFError:
        good, answer = False, "died"
    finally:
        process.kill()
        process.join()
        mine.close()
    if not good:
        raise RankError(f"a process alone failed: {answer}", (0,))
    return answer


@functools.cache
def _pool() -> "_Pool":
    return _Pool()


@functools.cache
def forkserver() -> Any:
    """A process that has imported megatron-core once and forks the ranks (it runs no threads)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
    return context


class _Worker:
    """One rank's process, in a session of its own so that its children die with it."""

    def __init__(self, rank: int, directory: Path):
        self.rank = rank
        self.log = directory / f"rank{rank}-{time.monotonic_ns()}.log"
        self.log.touch()
        self.connection, theirs = multiprocessing.Pipe()
        with theirs:
            self.process = forkserver().Process(target=_work, args=(rank, theirs, str(self.log)))
            self.process.start()

    def kill(self) -> None:
        for kill in (os.killpg, os.kill):  # the second for one that has no session yet
            with contextlib.suppress(ProcessLookupError):
                kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.connection.close()

    def tail(self, size: int = 4000) -> str:
        return self.log.read_bytes()[-size:].decode(errors="replace").strip()

    def stacks(self) -> str:
        """The end of the output after asking every thread for its stack, which may take its time on a busy machine."""
        before = self.log.stat().st_size
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline and b"Current thread" not in self.log.read_bytes()[before:]:
            time.sleep(0.05)
        time.sleep(0.2)  # the rest of it
        return self.tail()


class _Pool:
    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="megatron_vlm_ranks_"))
        self.owner = os.getpid()
        self.workers: list[_Worker] = []
        self.group: tuple[int, int] | None = None  # (world size, serial number) of the living process group
        self.serial = 0
        atexit.register(self.close)

    def close(self) -> None:
        if os.getpid() == self.owner:  # not in a fork of the parent
            self._kill()
            shutil.rmtree(self.directory, ignore_errors=True)

    def run(self, world: int, fn: Callable[..., Any], args: tuple, kwargs: dict, timeout: float) -> list[Any]:
        with self._turn(world):
            return self._run(world, fn, args, kwargs, timeout)

    @contextlib.contextmanager
    def _turn(self, world: int) -> Iterator[None]:
        """Several ranks compute for one pool at a time on a machine: two pools on few cores would slow each other down."""
        with open(Path(tempfile.gettempdir()) / f"megatron_vlm_ranks_{os.getuid()}.lock", "w") as file:
            if world > 1:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _run(self, world: int, fn: Callable[..., Any], args: tuple, kwargs: dict, timeout: float) -> list[Any]:
        self._start(world)
        if self.group is None or self.group[0] != world:
            self.serial += 1
            self.group = (world, self.serial)
        module = sys.modules[fn.__module__]
        where = (fn.__module__, str(module.__file__), fn.__qualname__, sys.path)
        store = str(self.directory / f"store{self.serial}")
        job = pickle.dumps((self.group, store, where, pickle.dumps((args, kwargs))))
        for worker in self.workers[:world]:
            with contextlib.suppress(BrokenPipeError):  # it died since; reported below
                worker.connection.send_bytes(job)
        return self._collect(self.workers[:world], timeout)

    def _start(self, world: int) -> None:
        if any(not worker.process.is_alive() for worker in self.workers):
            self._kill()
        new = [_Worker(rank, self.directory) for rank in range(len(self.workers), world)]
        self.workers += new
        if new:
            self._collect(new, START_SECONDS)

    def _collect(self, workers: list[_Worker], timeout: float) -> list[Any]:
        """Waits for one answer from each worker; kills the pool where any is left without."""
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        usable, deadline = True, time.monotonic() + timeout
        waiting: dict[Any, _Worker] = {worker.connection: worker for worker in workers}
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                for worker in waiting.values():
                    late = (
                        f"no answer after {timeout:g} s" if not failures else "still waiting after another rank failed"
                    )
                    failures[worker.rank] = f"{late}; its output ends:\n{worker.stacks()}"
                usable = False
                break
            for connection in ready:
                worker = waiting.pop(connection)
                try:
                    good, answer = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, OSError):
                    usable, good = False, False
                    worker.process.join()
                    answer = f"died with exit code {worker.process.exitcode}; its output ends:\n{worker.tail()}"
                if good:
                    results[worker.rank] = answer
                else:
                    failures[worker.rank] = answer
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if failures:
            self.group = None
            if not usable:
                self._kill()
            text = "\n".join(f"rank {rank} of {len(workers)}: {text}" for rank, text in failures.items())
            raise RankError(text, tuple(failures))
        return [results[worker.rank] for worker in workers]

    def _kill(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers, self.group = [], None


# ---- the worker's side ----


def _work(rank: int, connection: Connection, log: str) -> None:
    """Answers jobs until the parent closes the pipe."""
    os.setsid()
    _redirect(log)
    import torch

    from megatron_vlm.parallel import cpu  # loads megatron-core, which the parent may not need

    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    cpu.install()
    gc.freeze()  # what was imported stays: to look through it again and again would copy the server's pages, too
    connection.send_bytes(pickle.dumps((True, None)))
    environment, folder = dict(os.environ), os.getcwd()
    group: tuple[int, int] | None = None
    while True:
        try:
            wanted, store, where, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            if group != wanted:
                _join(rank, wanted[0], store)
                group = wanted
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(wanted[0]))
            _reset_torch()
            answer = pickle.dumps((True, _call(where, arguments)))
        except KeyboardInterrupt:
            raise
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
            group = None
        _clean_up()
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        connection.send_bytes(answer)
        if group is None:
            _leave()


def _alone(connection: Connection, where: tuple[str, str, str, list[str]], arguments: bytes) -> None:
    from megatron_vlm.parallel import cpu  # loads megatron-core, which the parent may not need

    cpu.install()
    _reset_torch()
    try:
        answer = pickle.dumps((True, _call(where, arguments)))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    connection.send_bytes(answer)


def _call(where: tuple[str, str, str, list[str]], arguments: bytes) -> Any:
    name, file, qualname, path = where
    sys.path[:] = path
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:  # pytest's importlib mode
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    args, kwargs = pickle.loads(arguments)
    return functools.reduce(getattr, qualname.split("."), module)(*args, **kwargs)  # type: ignore[operator]


def _redirect(log: str) -> None:
    with open(log, "ab", buffering=0) as file, open(os.devnull, "rb") as nothing:
        for source, target in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(source.fileno(), target)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)


def _join(rank: int, world: int, store: str) -> None:
    import torch.distributed as dist

    _leave()
    # The parent's deadline ends a call; the group only needs to outlive it.
    timeout = datetime.timedelta(minutes=30)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)


def _leave() -> None:
    """Closes the sockets: after a failure, ranks that wait for this one then fail too instead of waiting on."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _reset_torch() -> None:
    import numpy
    import torch

    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)


def _clean_up() -> None:
    from megatron_vlm.parallel.topology import destroy_topology  # loads megatron-core, which the parent may not need

    destroy_topology()
    for _ in range(2):  # an optimizer first, which holds the graph's nodes that DDP's hooks are on
        gc.collect()


def _die_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)
