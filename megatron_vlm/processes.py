"""What the kernel says of processes on this host: whether one lives, is stopped, and is still the one that was meant.

Identity.of(pid) --written to a store or a file--> Identity.lives, .stopped, .kill: of that very process, not of a later one
that has its number
"""

import contextlib
import ctypes
import functools
import os
import signal
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Identity:
    """One process for all time: where it runs, its number, and when it started (a number is used again).

    Attributes:
        host: name of the machine.
        place: boot and process number space, so that two containers or boots of one name differ.
        pid: its number there.
        start: clock ticks from boot to its start; 0 where the kernel does not tell.
    """

    host: str
    place: str
    pid: int
    start: int

    @classmethod
    def of(cls, pid: int | None = None) -> Self:
        """A process of this host; None: this one."""
        pid = os.getpid() if pid is None else pid
        return cls(socket.gethostname(), _place(), pid, _start(pid))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """From ``to_dict``.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        return cls(str(data["host"]), str(data["place"]), int(data["pid"]), int(data["start"]))

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)

    @property
    def here(self) -> bool:
        """Whether this process can see that one."""
        return (self.host, self.place) == (socket.gethostname(), _place())

    @property
    def lives(self) -> bool:
        """Whether it is still there; True where it cannot be seen from here."""
        return not self.here or (state(self.pid) not in ("", "Z", "X") and _start(self.pid) == self.start)

    @property
    def stopped(self) -> bool:
        """Whether it is there and stopped by a signal or a debugger; False where it cannot be seen from here."""
        return self.here and self.lives and state(self.pid) in ("T", "t")

    def kill(self) -> None:
        """Ends it and its children at once, if it is of this host and still there."""
        if self.here and self.lives:
            for pid in (self.pid, *children(self.pid)):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def state(pid: int) -> str:
    """The kernel's letter for what a process does (R, S, D, T: stopped, Z: ended); "" for none of that number.

    Without /proc, S where the number is in use.
    """
    fields = _stat(pid)
    if fields:
        return fields[0]
    if Path("/proc/self/stat").exists():
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:  # somebody else's
        pass
    return "S"


def children(pid: int) -> list[int]:
    """Numbers of the processes that ``pid`` started, not of theirs."""
    numbers = []
    with contextlib.suppress(OSError):
        for entry in os.listdir("/proc"):
            if entry.isdecimal() and (fields := _stat(int(entry))) and int(fields[1]) == pid:
                numbers.append(int(entry))
    return numbers


def signal_with_parent(number: int) -> None:
    """Asks the kernel to send this process a signal once the thread that started it has ended. Linux; elsewhere nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def available_memory() -> int:
    """Bytes that this process may still take, by the kernel's count and the control group's limit."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return min(free, int(limit) - used) if limit != "max" else free
    except (OSError, ValueError):
        return free


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name, which may hold blanks and brackets itself: state, parent, ..."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes().decode(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _start(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 else 0


@functools.cache
def _place() -> str:
    parts = []
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        with contextlib.suppress(OSError):
            parts.append(read())
    return " ".join(parts)
