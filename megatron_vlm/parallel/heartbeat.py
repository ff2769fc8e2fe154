"""A sign of life of every rank, and an end of all where one gives none: in seconds, whatever a collective may wait.

    main thread: at("step", 12) --> record --beat thread--> store <--> records of the others, verdict
    watch thread: rank 0 looks at all records, the others at rank 0's; a process that is gone, failed, or silent for too long
        --verdict--> store --> every living rank: stacks to FOLDER/stacks/rank-R.txt, who and where, exit code 1

Slow is not stuck: the beat thread goes on while the main thread loads, waits for data, compiles, saves or evaluates. A
process that is stopped (SIGSTOP), dead or cut off from the network beats no more. A main thread that stands still while
its process beats is told of with its stack, and ended by the time-out of its collective.
"""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_vlm.errors import TrainingError
from megatron_vlm.log import get_logger
from megatron_vlm.parallel.place import START_TIMEOUT, Place
from megatron_vlm.parallel.verdict import Record, Seen, Verdict, judge, missing
from megatron_vlm.processes import Identity, children

log = get_logger(__name__)

TIMEOUT = 40.0
_STANDSTILL = 600.0  # seconds in one phase of one iteration that are worth a warning
_QUICK = 0.1  # between looks at the store while ranks come and go
_LEAVE = 5.0  # for what an end may still write or wait for
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""What torch.distributed says, in a RuntimeError, where a peer is gone."""
_LATE_PEER = ("Timed out waiting", "timed out after", "Timed out after")


class Heartbeat:
    """This rank's sign of life, from construction to the end of its ``with`` block.

    A rank alone watches its parent only.

    Attributes:
        timeout: seconds without a sign of life, after which a rank counts as lost.
        folder: gets ``stacks/`` and, from rank 0, a line in ``train.log``; None: stacks go to stderr.
        on_orphan: called where torchrun's agent is gone; the process then has ``timeout`` seconds to save and end.

    Raises:
        TrainingError: the store cannot be reached within ``START_TIMEOUT`` seconds.
        ConfigError: the port is taken.
    """

    def __init__(self, timeout: float = TIMEOUT):
        self.timeout = timeout
        self.folder: Path | None = None
        self.on_orphan: Callable[[], None] | None = None
        self._place = Place.of_environment()
        self._record = Record(rank=self._place.rank, who=Identity.of())
        self._moved, self._warned = time.monotonic(), False
        self._seen: dict[int, Seen] = {}
        self._all_came = self._place.world == 1
        self._verdict: Verdict | None = None
        self._orphaned: float | None = None
        self._closed = threading.Event()
        self._leaving = self._joining = False  # the main thread ends with an error, or may: it ends the process itself
        self._ending = False  # the watch ends the process
        self._beats = 0
        self._store: Any = None  # torch's, and the server where rank 0 keeps it
        self._line: Any = None  # a connection of our own: an operation that waits keeps torch's busy
        self._cut = False  # the last exchange failed
        if self._place.world > 1:
            self._store = self._place.open_store(server=self._place.rank == 0 and not self._place.agent)
            self._line = self._place.open_store()
        self._answered = time.monotonic()
        threading.Thread(target=self._watch, name="heartbeat watch", daemon=True).start()
        self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        if self._line is not None:
            self._beating.start()

    # ---- the main thread's side ----

    def at(self, phase: str, iteration: int | None = None) -> None:
        """Says what the main thread does now."""
        iteration = self._record.iteration if iteration is None else iteration
        self._record = replace(self._record, phase=phase, iteration=iteration)
        self._moved, self._warned = time.monotonic(), False

    def join(self, start_timeout: float = START_TIMEOUT) -> Any:
        """Waits for every rank; returns torch's store, or None where this rank is alone.

        Raises:
            TrainingError: no rank more came for ``start_timeout`` seconds, and some are missing.
        """
        count, since = 0, time.monotonic()
        self._joining = True
        while not self._all_came:
            if self._verdict is not None:
                self._end_doomed(self._verdict)
                raise TrainingError(self._verdict.text)
            if len(self._seen) > count:
                count, since = len(self._seen), time.monotonic()
            if self._place.rank == 0 and time.monotonic() - since > start_timeout:
                present = [0, *self._seen]
                where, beside = str(self._place), self._place.beside()
                self._pass_judgement(missing(self._place.world, present, start_timeout, where, beside))
            time.sleep(_QUICK)
        self._joining = False
        return self._store

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends together with the others; torch's error of a lost peer becomes one that names it.

        Raises:
            TrainingError: in place of torch's error.
        """
        try:
            if error is None:
                self.at("closing")
                self._wait_for_all()
                self.at("ended")
                self._last_beat()  # rank 0 hears that the others have heard of its end, and may end what they speak through
                self._closed.set()
                if self._beating.is_alive():  # inside torch's store when Python ends it would abort the process
                    self._beating.join(_LEAVE)
                return
            while self._ending:  # what the watch does now: it has told why
                time.sleep(_QUICK)
            words = str(error) if isinstance(error, RuntimeError) else ""
            lost, late = (any(text in words for text in texts) for texts in (_LOST_PEER, _LATE_PEER))
            self._leaving = True
            self._record = replace(self._record, why=str(error)[:2000] or type(error).__name__)
            self.at("lost" if lost or late else "failed")
            if late and not lost:
                self._aside(self._write_stacks, "a collective waited longer than parallel.distributed_timeout_minutes")
            text = self._ask_why() if lost or late else ""
            if self._verdict is not None and self._verdict.doomed:
                self._aside(self._write_stacks, self._verdict.text)
            self._last_beat()
            if lost or late:
                text = text or (
                    "another rank ended, its output says why" if lost else f"a rank is late, see {self._stacks}"
                )
                named = TrainingError(f"{text} ({words.splitlines()[0]})")
                named.echo = self._verdict is not None and self._place.rank != self._speaker(self._verdict)  # type: ignore
                raise named from error
        finally:
            self._closed.set()

    def _wait_for_all(self) -> None:
        """Rank 0 waits for everyone's end, the others for rank 0's: one that stops in its last moments is found, too."""
        while self._line is not None:
            if self._place.rank == 0 and self._all_over:
                return
            done = self._all_over and self._seen[0].record.phase != "closing" if self._place.rank else False
            if done or (self._place.rank and self._cut):
                return
            time.sleep(_QUICK / 2)

    @property
    def _all_over(self) -> bool:
        """Every rank that this one looks at has come to its end."""
        watched = self._place.world - 1 if self._place.rank == 0 else 1
        return len(self._seen) == watched and all(one.record.over for one in list(self._seen.values()))

    def _ask_why(self) -> str:
        """What is known of the rank that was lost, after a while at most."""
        patience = time.monotonic() + min(2 * _LEAVE, self.timeout)
        while self._line is not None and self._verdict is None and time.monotonic() < patience:
            time.sleep(_QUICK)
        return self._verdict.text if self._verdict is not None else ""

    def _last_beat(self) -> None:
        """Leaves the last word in the store; where this rank keeps it, until the others have read it."""
        beats, patience = self._beats, time.monotonic() + _LEAVE
        while self._line is not None and time.monotonic() < patience and not self._cut:
            gone = self._all_over and all(one.record.phase != "closing" for one in list(self._seen.values()))
            if self._beats >= beats + 2 - bool(self._place.rank) and (gone or self._place.agent or self._place.rank):
                return
            time.sleep(_QUICK / 2)

    # ---- the beat thread: the only one that may wait for the store ----

    @property
    def _pause(self) -> float:
        """Seconds between two signs of life."""
        return min(self.timeout / 15, 5.0)

    @property
    def _interval(self) -> float:
        quick = self._record.over or not self._all_came or self._verdict is not None
        return _QUICK if quick else self._pause

    def _beat(self) -> None:
        while not self._closed.is_set():
            try:
                if self._line is None or self._cut:
                    self._line = self._place.open_store(seconds=_LEAVE)
                self._exchange()
                self._answered, self._cut = time.monotonic(), False
            except Exception:  # told by the watch, if it lasts
                self._cut = True
            began = time.monotonic()
            while time.monotonic() - began < self._interval and not self._closed.wait(_QUICK):
                pass  # in small parts: the interval is shorter once the end has come

    def _exchange(self) -> None:
        """Writes this rank's record and the verdict, reads those of others."""
        line, place = self._line, self._place
        line.set(f"beat/{place.rank}", replace(self._record, beat=self._beats + 1).to_json())
        self._beats += 1
        for rank in range(place.world) if place.rank == 0 else (0,):
            if rank != place.rank and rank not in self._seen and line.check([f"beat/{rank}"]):
                self._seen[rank] = Seen(Record(rank=rank, who=self._record.who), time.monotonic())
        if not self._all_came:
            if place.rank == 0 and len(self._seen) == place.world - 1:
                line.set("all", "1")
            self._all_came = bool(line.check(["all"]))
        if self._verdict is not None:
            line.compare_set("verdict", "-", self._verdict.to_json())
        ranks = list(self._seen)
        verdict, *texts = line.multi_get(["verdict", *(f"beat/{rank}" for rank in ranks)])
        for rank, text in zip(ranks, texts):
            record, seen = Record.from_json(text.decode()), self._seen[rank]
            if record.beat != seen.record.beat or record.who != seen.record.who:
                seen.record, seen.since = record, time.monotonic()
        if verdict != b"-" and self._verdict is None:
            self._verdict = Verdict.from_json(verdict.decode())

    # ---- the watch thread: waits for nothing ----

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(_QUICK if self._record.over else min(1.0, self.timeout / 15)):
            now = time.monotonic()
            if now - last > self.timeout / 3:  # this process stood still: the others' signs wait unread
                self._answered = now
                for seen in list(self._seen.values()):
                    seen.since = now
            last = now
            self._look_at_parent(now)
            if self._verdict is None:
                self._look_at_ranks(now)
            if self._verdict is not None and not (self._leaving or self._joining):
                self._end(self._verdict)
            self._look_at_main_thread(now)

    def _look_at_ranks(self, now: float) -> None:
        quick = self._record.phase == "lost"
        found = judge(
            dict(self._seen),
            now,
            timeout=self.timeout,
            settled=1.0 if quick else 2 * self._pause + 1.0,
            grace=0.0 if quick else min(3 * _LEAVE, self.timeout / 2),
            hint="Start again to go on from the last checkpoint; parallel.heartbeat_timeout_seconds "
            f"{self.timeout:g} is how long a rank may be silent",
        )
        if found is None and self._line is not None and now - self._answered >= self.timeout and not self._record.over:
            known = self._seen.get(0)
            keeper = (
                "" if self._place.agent or known is None else f" ({known.record.who}; last in {known.record.place})"
            )
            found = Verdict(
                f"no sign of life: {self._place}{keeper} does not answer for {now - self._answered:.0f} s: stopped, dead, or "
                "cut off from this rank",
                () if self._place.agent else (0,),
                (known.record.who,) if known is not None and not self._place.agent else (),
            )
        if found is not None:
            self._pass_judgement(found)

    def _pass_judgement(self, verdict: Verdict) -> None:
        """Takes a verdict; the beat thread passes it on."""
        if self._verdict is None:
            self._verdict = verdict

    def _look_at_parent(self, now: float) -> None:
        if self._place.parent is None or os.getppid() == self._place.parent:
            return
        if self._orphaned is None:
            self._orphaned = now
            if self.on_orphan is not None and not self._record.over:
                self.on_orphan()
                return
        if now - self._orphaned >= (self.timeout if self.on_orphan is not None else 0.0) and not self._record.over:
            self._end(Verdict(f"torchrun's process {self._place.parent}, which started this rank, is gone", ()))

    def _look_at_main_thread(self, now: float) -> None:
        if self._warned or now - self._moved < _STANDSTILL or self._record.phase not in ("step", "save"):
            return
        self._warned = True
        text = f"{self._record.place} for {now - self._moved:.0f} s: slow, or ranks that wait for one another"
        self._aside(self._write_stacks, text)
        self._aside(log.warning, "%s; Python stacks: %s", text, self._stacks)

    def _end(self, verdict: Verdict) -> None:
        """Ends this process."""
        self._ending = True
        where = f"[rank {self._place.rank}] " if self._place.world > 1 else ""
        self._aside(self._write_stacks, verdict.text)
        if self._place.rank == self._speaker(verdict) or not verdict.ranks:
            text = f"{where}error: {verdict.text}. Python stacks of the ranks that live: {self._stacks}\n"
            self._aside(self._write_log, text)
        else:
            text = f"{where}ends, because rank {', '.join(map(str, verdict.ranks[:8]))} was lost\n"
        with suppress(OSError):
            os.write(2, text.encode())
        # Nobody goes before the others have the verdict: they would take the closed connection for the cause.
        self._record = replace(self._record, phase="lost", why=verdict.text[:2000])
        patience = time.monotonic() + (_LEAVE if self._place.rank == 0 else self._pause + 2 * _QUICK)
        ranks = [one for rank, one in self._seen.items() if rank not in verdict.ranks]
        while self._line is not None and time.monotonic() < patience:
            if self._place.rank == 0 and all(one.record.over for one in ranks):
                break
            time.sleep(_QUICK)
        self._end_doomed(verdict)
        for pid in children(os.getpid()):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        os._exit(1)

    def _speaker(self, verdict: Verdict) -> int:
        """The rank that tells the whole story: the lowest that is left."""
        return min((rank for rank in range(self._place.world) if rank not in verdict.ranks), default=0)

    def _end_doomed(self, verdict: Verdict) -> None:
        for identity in verdict.doomed:
            if identity != self._record.who:
                identity.kill()

    # ---- what may hang on a disk ----

    @property
    def _stacks(self) -> str:
        return str(self.folder / "stacks") if self.folder is not None else "above"

    def _aside(self, work: Callable[..., None], *args: Any) -> None:
        """Does it in a thread of its own and waits a while: a disk that does not answer holds up nobody."""

        def do() -> None:
            with suppress(OSError):
                work(*args)

        thread = threading.Thread(target=do, daemon=True)
        thread.start()
        thread.join(_LEAVE)

    def _write_stacks(self, why: str) -> None:
        if self.folder is None:
            faulthandler.dump_traceback(all_threads=True)
            return
        (self.folder / "stacks").mkdir(parents=True, exist_ok=True)
        with open(self.folder / "stacks" / f"rank-{self._place.rank}.txt", "w", encoding="utf-8") as file:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"{stamp} rank {self._place.rank}, {self._record.who}, {self._record.place}\n{why}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _write_log(self, text: str) -> None:
        if self.folder is not None:
            with open(self.folder / "train.log", "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%H:%M:%S')} ERROR {text}")
