"""Rows made ahead of their use by worker processes, in order and within a bound of memory.

    plans --numbered--> tasks --> workers: RowReader --> a pipe of each --put in order--> rows
                                    ^ a thread watches them: one that ended, or stays stopped, ends the wait for it

A worker gets a RowPlan and gives back a row; it holds nothing but open files. Workers are spawned, not forked: a
training process has threads and device handles that do not survive a fork. They end with their parent, however it ends.
"""

import atexit
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.row import Row, pack_pixels
from megatron_vlm.data.stream.reader import Fetched, RowReader
from megatron_vlm.data.stream.step_plan import RowPlan
from megatron_vlm.errors import TrainingError
from megatron_vlm.log import get_logger
from megatron_vlm.processes import signal_with_parent, state

log = get_logger(__name__)

_FOR_THE_PARENT = (signal.SIGINT, signal.SIGTERM)
_POLL_SECONDS = 2.0  # between looks at whether the other side still lives
_STOPPED_SECONDS = 20.0  # a worker that a signal stopped has this long to go on
_ROWS = 4  # that each worker keeps ready at first
_MOST_ROWS = 128  # together, each of which takes two file descriptors
_SLOW_SECONDS = 300.0  # between warnings of a row that does not come


class RowWorkers(Iterator[Fetched]):
    """What ``reader`` makes of each plan, in order, from ``config.num_workers`` processes (0: this one).

    Each worker makes up to ``prefetch_rows`` rows ahead, as long as those that wait and those being made (each taken for as
    large as the largest so far) stay within ``prefetch_mb``; at first each makes one. Where that is not told, it is what the run
    turns out to need: a row that is waited for although workers had nothing left to do doubles it. ``close`` ends the processes;
    it is called at the end of the program if nobody else does.
    """

    def __init__(self, reader: RowReader, plans: Iterable[RowPlan], config: DataConfig):
        self._reader, self._plans = reader, iter(plans)
        self._open, self._workers = True, []
        if config.num_workers == 0:
            return
        self._most_rows = config.num_workers * (config.prefetch_rows or _ROWS)
        self._may_grow = config.prefetch_rows is None
        self._full = -1  # number of the first row that was not made yet when workers had last made all that they may
        self._most_bytes = config.prefetch_mb * 2**20
        self._sent = self._taken = 0  # plans given to workers, rows given to the caller
        self._ready: dict[int, tuple[Fetched, _Packed]] = {}
        self._held = self._largest = 0  # bytes of the rows that are ready; of the largest row so far
        context = torch.multiprocessing.get_context("spawn")
        self._tasks = context.Queue()
        self._tasks.cancel_join_thread()
        # Each has a pipe of its own: what a killed worker leaves half written there ends in an error, not in a wait.
        pipes = [context.Pipe(duplex=False) for _ in range(config.num_workers)]
        self._results = [mine for mine, _ in pipes]
        bound = threading.current_thread() is threading.main_thread()  # the kernel looks at the thread that starts them
        self._workers = [
            context.Process(target=_work, args=(reader, self._tasks, theirs, os.getpid(), bound), daemon=True)
            for _, theirs in pipes
        ]
        # A signal to all processes of a job must not end one that is still starting and cannot heed it yet: it is held back.
        resource_tracker.ensure_running()  # which would let them through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_PARENT)
        try:
            for worker, (_, theirs) in zip(self._workers, pipes):
                worker.start()
                theirs.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._lost = ""  # what the watch found
        threading.Thread(target=self._watch, name="data worker watch", daemon=True).start()
        # multiprocessing would send its children a SIGTERM, which these do not heed, and wait.
        atexit.register(self.close)
        self._send()

    def __next__(self) -> Fetched:
        if not self._open:
            raise StopIteration
        if not self._workers:
            item: Fetched = self._reader[next(self._plans)]
        else:
            self._send()
            if self._taken == self._sent:
                raise StopIteration
            while wait(self._results, 0):
                self._receive()
            self._send()
            if self._may_grow and len(self._ready) >= self._most_rows:
                self._full = self._taken + len(self._ready)
            if self._taken == self._full and self._taken not in self._ready and self._most_rows < _MOST_ROWS:
                self._most_rows = min(2 * self._most_rows, _MOST_ROWS)
                log.info("data workers keep up to %d rows ready now: a step waited for one", self._most_rows)
                self._send()
            while self._taken not in self._ready:
                self._receive()
                self._send()
            item, packed = self._ready.pop(self._taken)
            self._taken += 1
            self._held -= _size(packed)
            self._send()
            if packed is not None:
                item = replace(item, row=Row.unpack(*packed))
        if item.error is not None:
            raise item.error
        return item

    def close(self) -> None:
        """Ends the worker processes."""
        self._open = False
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()
        for connection in self._results if self._workers else ():
            connection.close()
        atexit.unregister(self.close)

    def _send(self) -> None:
        """Gives out plans as far as rows and bytes allow."""
        while (ahead := self._sent - self._taken) < self._most_rows:
            making = ahead - len(self._ready)
            if not self._largest and ahead >= len(self._workers):  # nothing is known of the size of a row yet
                return
            if ahead and self._held + (making + 1) * self._largest > self._most_bytes:
                return
            plan = next(self._plans, None)
            if plan is None:
                return
            self._tasks.put((self._sent, plan))
            self._sent += 1

    def _receive(self) -> None:
        """Waits for a row.

        Raises:
            TrainingError: a worker ended, or stays stopped.
        """
        began = warned = time.monotonic()
        while not (ready := wait(self._results, _POLL_SECONDS)):
            self._check()
            if time.monotonic() - warned > _SLOW_SECONDS:
                warned = time.monotonic()
                states = ", ".join(f"{worker.pid} ({state(worker.pid or 0) or 'gone'})" for worker in self._workers)
                log.warning(
                    "no row from the data workers for %.0f s: storage that does not answer? Processes and their states "
                    "(D: waits for a disk): %s",
                    warned - began,
                    states,
                )
        connection = ready[0]
        assert isinstance(connection, Connection)
        try:
            number, item, packed, failure = connection.recv()
        except (EOFError, OSError):  # it ended while it told of a row, or of where the row's memory is
            for _ in range(20):
                self._check()
                time.sleep(0.1)
            raise
        if failure:
            raise RuntimeError(f"in a data worker:\n{failure}")
        self._ready[number] = (item, packed)
        size = _size(packed)
        self._held += size
        self._largest = max(self._largest, size)

    def _check(self) -> None:
        """Raises TrainingError for a worker that ended."""
        dead = [worker for worker in self._workers if not worker.is_alive()]
        if self._lost or dead:
            raise TrainingError(
                self._lost
                or f"data worker {dead[0].pid} ended with exit code {dead[0].exitcode}; killed for want of memory? "
                "Lower data.num_workers or data.prefetch_mb"
            )

    def _watch(self) -> None:
        """Ends a worker that stays stopped: whoever waits for it, for a row or for the memory of one, then finds it gone."""
        since: dict[int, float] = {}
        while self._open:
            time.sleep(min(_POLL_SECONDS, _STOPPED_SECONDS / 4))
            now = time.monotonic()
            stopped = [worker for worker in self._workers if state(worker.pid or 0) == "T"]
            since = {worker.pid or 0: since.get(worker.pid or 0, now) for worker in stopped}
            for worker in stopped:
                seconds = now - since[worker.pid or 0]
                if seconds >= _STOPPED_SECONDS and self._open:
                    self._lost = (
                        f"data worker {worker.pid} was stopped by a signal and did not go on for {seconds:.0f} s "
                        "(SIGSTOP, or a scheduler that suspends jobs): it was ended, and the run with it"
                    )
                    worker.kill()
                    return


def _work(
    reader: RowReader, tasks: "torch.multiprocessing.Queue", results: Connection, parent: int, bound: bool
) -> None:
    """A worker. Signals are left to the parent: a scheduler signals every process, and the parent needs rows to finish its
    step."""
    for number in _FOR_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_THE_PARENT)
    if bound:  # even one that is stopped ends with its parent
        signal_with_parent(signal.SIGKILL)
    torch.set_num_threads(1)
    while os.getppid() == parent:  # from the parent itself: it may have ended before this process looked
        try:
            number, plan = tasks.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            continue
        try:
            item, packed, failure = *_pack(reader[plan]), ""
        except Exception:  # goes to the parent as text: not every exception can be sent
            item, packed, failure = Fetched(), None, traceback.format_exc()
        try:
            results.send((number, item, packed, failure))
        except OSError:  # nobody takes it any more
            break
    os._exit(0)  # a row that nobody takes any more would hold up an orderly exit


_Packed = tuple[dict[str, Any], Tensor, Tensor] | None  # a row's header, whole numbers and pixels


def _pack(item: Fetched) -> tuple[Fetched, _Packed]:
    """Joins a row's tensors to two: each tensor that leaves a worker takes a file descriptor of shared memory."""
    if item.row is None:
        return item, None
    return replace(item, row=None), (*item.row.pack(), pack_pixels(item.row.pixels))


def _size(packed: _Packed) -> int:
    return 0 if packed is None else packed[1].nbytes + packed[2].nbytes
