"""One run at a time in a folder: a lock that says who holds it, and that a dead run does not keep.

    RunLock(folder) --link, of a whole file--> run.lock {host, pid, start, token}
        held: by a process of this host: it lives, or the lock is taken over
              by one elsewhere: its time stamp moves, or the lock is taken over once it stood still for long

The holder renews the time stamp from a thread, and finds out if somebody took the folder over meanwhile.
"""

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_vlm.errors import CheckpointError, ConfigError
from megatron_vlm.files import unique_temporary
from megatron_vlm.log import get_logger
from megatron_vlm.processes import Identity

log = get_logger(__name__)

LOCK = "run.lock"
INTERVAL = 10.0
"""Seconds between two renewals."""
_STALE = 4  # intervals without one, after which a run elsewhere counts as dead


class RunLock:
    """Holds a folder until ``close``.

    Args:
        folder: made where it does not exist.
        interval: see ``INTERVAL``.

    Raises:
        ConfigError: another run holds it, or it cannot be written.
    """

    def __init__(self, folder: Path, interval: float = INTERVAL):
        self.path, self._interval = folder / LOCK, interval
        self._token = uuid.uuid4().hex
        self._closed = threading.Event()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot be written: {error}: name another folder (--save, --output-dir)"
            ) from error
        threading.Thread(target=self._renew, name="run lock", daemon=True).start()

    def check(self) -> None:
        """Raises CheckpointError if another run has taken the folder over."""
        content = _read(self.path)
        if content is not None and content.get("token") != self._token:
            raise CheckpointError(
                f"{self.path.parent} was taken over by {_who(content)}, while this run gave no sign of life: two runs would "
                "delete each other's files. This one ends"
            )

    def close(self) -> None:
        """Gives the folder free."""
        self._closed.set()
        if (_read(self.path) or {}).get("token") == self._token:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _take(self) -> None:
        content = {**Identity.of().to_dict(), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "token": self._token}
        mine = unique_temporary(self.path)
        mine.write_text(json.dumps(content) + "\n", encoding="utf-8")
        try:
            while True:
                with contextlib.suppress(FileExistsError):
                    os.link(mine, self.path)  # whole or not at all, also on network file systems
                    return
                held = _read(self.path)
                if held is None:  # given free in between, or damaged
                    self._move_away(None)
                    continue
                why = _dead(self.path, held, self._interval)
                if why is None:
                    raise ConfigError(
                        f"{self.path.parent} is in use by {_who(held)}: wait for it, end it, or name another folder (--save, "
                        f"--output-dir). If no run uses it, remove {self.path}"
                    )
                log.warning("taking %s over from %s, %s", self.path.parent, _who(held), why)
                self._move_away(held.get("token"))
        finally:
            mine.unlink(missing_ok=True)

    def _move_away(self, token: Any) -> None:
        """Removes a lock that was judged; one that somebody else has put in its place meanwhile is put back."""
        aside = unique_temporary(self.path)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if (found := _read(aside)) is not None and found.get("token") != token:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()

    def _renew(self) -> None:
        while not self._closed.wait(self._interval):
            with contextlib.suppress(OSError):
                if (_read(self.path) or {}).get("token") == self._token:
                    os.utime(self.path)


class RunLocks:
    """Holds several folders, or none; the same folder named twice is one.

    Raises:
        ConfigError: as RunLock; none is held then.
    """

    def __init__(self, folders: Iterable[Path] = ()):
        self._locks: list[RunLock] = []
        try:
            for folder in sorted({folder.absolute() for folder in folders}):
                self._locks.append(RunLock(folder))
        except ConfigError:
            self.close()
            raise

    def check(self) -> None:
        """Raises CheckpointError if another run has taken one over."""
        for lock in self._locks:
            lock.check()

    def close(self) -> None:
        """Gives all free."""
        for lock in self._locks:
            lock.close()


def holder(folder: Path, interval: float = INTERVAL) -> str | None:
    """Who holds a folder now, in words; None: nobody that lives. May wait some intervals for a sign of a run elsewhere."""
    held = _read(folder / LOCK)
    return None if held is None or _dead(folder / LOCK, held, interval) is not None else _who(held)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
        Identity.from_dict(content)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content


def _dead(path: Path, held: dict[str, Any], interval: float) -> str | None:
    """Why a lock holds no more, in words; None: it holds."""
    who = Identity.from_dict(held)
    if who.here:
        return None if who.lives else "which ended without giving it free"
    # Elsewhere: its clock may differ, so its time stamp is watched, not read.
    first, patience = _stamp(path), time.monotonic() + _STALE * interval
    log.info("%s is held by %s; waiting up to %g s for a sign of life", path.parent, who, _STALE * interval)
    while time.monotonic() < patience:
        time.sleep(min(1.0, interval / 4))
        if _stamp(path) != first:
            return None if (_read(path) or {}).get("token") == held.get("token") else "which ended"
    return f"which gave no sign of life for {_STALE * interval:g} s"


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _who(held: dict[str, Any]) -> str:
    return f"process {held['pid']} on {held['host']} (since {held.get('since', '?')})"
