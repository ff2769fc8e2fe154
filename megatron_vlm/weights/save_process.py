"""A process that writes checkpoints while training goes on: what it writes lies in memory that both see.

    training process: tensors --HostImage.fill--> bytes of a rank file in shared memory
                      SaveProcess.start(function) --a pipe--> saving process: write_image, checkpoint_write.finish ...
                      SaveProcess.result() <--what it returned, or its error--

It is started once, by exec (a training process has threads, which no fork survives), imports neither torch nor megatron-core,
and ends with the process that started it, however that ends: a killed run writes no more. Signals are left to the run.
"""

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from megatron_vlm.errors import CheckpointError, MegatronVLMError
from megatron_vlm.processes import signal_with_parent
from megatron_vlm.weights.hashed_file import HashedFile

_FOR_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_START = "import sys; from megatron_vlm.weights.save_process import serve; serve(*map(int, sys.argv[1:]))"


class HostImage:
    """A file's bytes in memory that another process can read; it grows as needed, and is kept from one save to the next.

    Attributes:
        descriptor: of the memory.
        size: bytes that were filled in last.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("checkpoint")  # not /dev/shm, which containers keep small
        self.size = self.capacity = 0

    def resized(self, size: int) -> mmap.mmap:
        """The memory, of ``size`` bytes, to be filled; what it held before is lost.

        Raises:
            OSError: there is not so much memory.
        """
        if size > self.capacity:
            os.posix_fallocate(self.descriptor, 0, size)  # an error here, in place of a SIGBUS in mid-copy
            self.capacity = size
        self.size = size
        return mmap.mmap(self.descriptor, size)

    def close(self) -> None:
        """Lets go of the memory; a process that still reads it keeps it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def write_image(path: Path, descriptor: int, size: int) -> dict[str, Any]:
    """Writes a ``HostImage`` as a new file and flushes it to disk.

    Returns:
        ``{"size", "sha256"}`` of the file.

    Raises:
        ConversionError, OSError: the disk refuses.
    """
    file = HashedFile(path)
    try:
        with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as memory, memoryview(memory) as view:
            file.put(view)
        return file.close()
    except BaseException:
        file.abort()
        raise


class SaveProcess:
    """The saving process of this rank; one job at a time. It is started with the first one, and again if it ended.

    Args:
        image: memory that it shares.
    """

    def __init__(self, image: HostImage):
        self._image = image
        self._process: subprocess.Popen | None = None
        self._line: Connection | None = None
        self._busy = False

    @property
    def pid(self) -> int | None:
        """Number of the process; None before the first job."""
        return self._process.pid if self._process else None

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Has ``function(*arguments)`` called there. What crosses is pickled; its module should import little.

        Raises:
            OSError: the process cannot be started.
        """
        assert not self._busy
        if self._process is None or self._process.poll() is not None:
            self._spawn()
        assert self._line is not None
        self._busy = True
        with contextlib.suppress(OSError):  # it just ended: told by ``result``
            self._line.send((function, arguments))

    @property
    def done(self) -> bool:
        """Whether ``result`` would not wait; True where there is no job."""
        return not self._busy or self._line is None or self._line.poll()

    def result(self) -> Any:
        """Waits for the job and returns what the function did; None where there was no job.

        Raises:
            CheckpointError: it failed, or the process ended.
        """
        if not self._busy:
            return None
        assert self._line is not None and self._process is not None
        self._busy = False
        try:
            value, failure = self._line.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            raise CheckpointError(
                f"the process {self._process.pid} that writes checkpoints ended with exit code {code}; killed for want of "
                "memory?"
            ) from None
        if failure:
            raise CheckpointError(failure)
        return value

    def abandon(self) -> None:
        """Ends the process if it has a job whose result was not asked for."""
        if self._busy:
            self.close()

    def close(self) -> None:
        """Ends the process, in the middle of its job if it has one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._line is not None:
            self._line.close()
        self._process, self._line, self._busy = None, None, False

    def _spawn(self) -> None:
        self.close()
        self._line, theirs = Pipe()
        words = [theirs.fileno(), os.getpid()]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_PARENT)  # it cannot heed them yet
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, *map(str, words)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), self._image.descriptor),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()


def serve(descriptor: int, parent: int) -> None:
    """The saving process: does jobs until the pipe ends."""
    for number in _FOR_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_THE_PARENT)
    signal_with_parent(signal.SIGKILL)
    os.nice(10)  # where cores are short, the steps of the run come first
    line = Connection(descriptor)
    while os.getppid() == parent:  # it may have ended before this process looked
        try:
            function, arguments = line.recv()
        except EOFError:
            return
        value, failure = None, ""
        try:
            value = function(*arguments)
        except (MegatronVLMError, OSError) as error:
            failure = str(error)
        except Exception:  # goes to the parent as text: not every exception can be sent
            failure = f"in the process that writes checkpoints:\n{traceback.format_exc()}"
        line.send((value, failure))
