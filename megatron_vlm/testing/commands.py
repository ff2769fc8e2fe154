"""``megatron-vlm`` as a process of its own, forked from the server that has imported megatron-core.

    start(argv, log) -> Command, as subprocess.Popen --wait--> exit code
    run(argv) -> subprocess.CompletedProcess with its output

To import it anew takes a process longer than most runs of a test do. What is tested of the start itself needs a new Python.
"""

import atexit
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_vlm.cli.main import main
from megatron_vlm.testing.distributed import forkserver


class Command:
    """One that runs; in a session of its own, whose number is ``pid``."""

    def __init__(self, argv: Sequence[str], out: Path, err: Path, variables: dict[str, str]):
        self._argv = list(argv)
        self._process = forkserver().Process(target=_run, args=(self._argv, str(out), str(err), variables, os.getcwd()))
        self._process.start()
        atexit.register(self.kill)  # of a test that failed before it was done: multiprocessing would wait for it

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """Exit code, or None while it runs; -n: signal n ended it."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Exit code, once it is there.

        Raises:
            subprocess.TimeoutExpired: it still runs after ``timeout`` seconds.
        """
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self._argv, timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Sends a signal to it, not to its children."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it and its children."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.join()


def start(argv: Sequence[str], log: Path, **variables: object) -> Command:
    """Starts ``megatron-vlm argv`` with further environment variables; what it writes is added to ``log``."""
    return Command(argv, log, log, {name: str(value) for name, value in variables.items()})


def run(argv: Sequence[str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs ``megatron-vlm argv`` to its end; kills it after ``timeout`` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        command = Command(argv, out, err, {})
        try:
            code = command.wait(timeout)
        finally:
            command.kill()
        return subprocess.CompletedProcess(list(argv), code, out.read_text(), err.read_text())


def _run(argv: list[str], out: str, err: str, variables: dict[str, str], folder: str) -> None:
    os.setsid()
    for path, target in ((os.devnull, 0), (out, 1), (err, 2)):
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(file, target)
        os.close(file)
    os.environ.update(variables)
    os.chdir(folder)
    sys.exit(main(argv))
