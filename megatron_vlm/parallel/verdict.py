"""What the ranks of a job say of themselves, and what follows from it where one is lost. No threads, no store, no clock.

Record --json--> Record of another rank --Seen: when it last changed--> judge --> Verdict: who, where, since when, what to do
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from megatron_vlm.processes import Identity, state

_MAX_LISTED = 8


@dataclass(frozen=True)
class Record:
    """A rank's sign of life.

    Attributes:
        rank, who: the rank and its process.
        phase: what its main thread does.
        iteration: the last one done or begun; None before the first.
        why: the error it ends with.
        beat: grows with every sign.
    """

    rank: int
    who: Identity
    phase: str = "start"
    iteration: int | None = None
    why: str = ""
    beat: int = 0

    @property
    def over(self) -> bool:
        """Its main thread has come to an end, good or bad."""
        return self.phase in ("closing", "ended", "failed", "lost")

    @property
    def place(self) -> str:
        """Where it stood, in words."""
        return f"phase {self.phase}" + (f", iteration {self.iteration}" if self.iteration is not None else "")

    def to_json(self) -> str:
        """As text for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """From ``to_json``."""
        data = json.loads(text)
        return cls(**{**data, "who": Identity.from_dict(data["who"])})


@dataclass
class Seen:
    """A rank's last record, when it changed and when its process was first found gone, by this process's clock."""

    record: Record
    since: float
    gone: float | None = None


@dataclass(frozen=True)
class Verdict:
    """Why all ranks end.

    Attributes:
        text: who, where, since when, what to do.
        ranks: those that are lost.
        doomed: processes to be ended, by whoever is on their host: they may never end by themselves.
    """

    text: str
    ranks: tuple[int, ...]
    doomed: tuple[Identity, ...] = ()

    def to_json(self) -> str:
        """As text for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """From ``to_json``."""
        data: dict[str, Any] = json.loads(text)
        doomed = tuple(Identity.from_dict(one) for one in data["doomed"])
        return cls(data["text"], tuple(data["ranks"]), doomed)


def judge(
    seen: Mapping[int, Seen], now: float, *, timeout: float, settled: float, grace: float, hint: str
) -> Verdict | None:
    """Finds ranks that ended without a word, that failed, or that gave no sign of life for too long.

    Args:
        seen: by rank; ``gone`` is kept up to date here.
        now: the clock of ``seen``.
        timeout: seconds without a sign.
        settled: seconds after which a process that is gone has surely left no word that is still to be read.
        grace: seconds that the others have to notice a rank that failed by themselves.
        hint: ends the text on silence: what to set.
    """
    failed, gone, silent = [], [], []
    for one in seen.values():
        if one.record.phase == "failed" and now - one.since >= grace:
            failed.append(one)
        if one.record.over:
            continue
        if one.record.who.lives:
            one.gone = None
        elif one.gone is None:
            one.gone = now
        if one.gone is not None and now - one.gone >= settled:
            gone.append(one)
        elif now - one.since >= timeout:
            silent.append(one)
    if failed:
        first = failed[0].record
        return Verdict(f"rank {first.rank} ({first.who}) ended with an error: {first.why}", _ranks(failed))
    if gone:
        text = _each(gone, lambda one: f"last in {one.record.place}")
        return Verdict(f"{text}: ended without a word: killed (for want of memory?), or crashed", _ranks(gone))
    if silent:
        text = _each(
            silent, lambda one: f"silent for {now - one.since:.0f} s, last in {one.record.place}{_how(one.record.who)}"
        )
        doomed = tuple(one.record.who for one in silent)
        return Verdict(f"no sign of life: {text}. {hint}", _ranks(silent), doomed)
    return None


def missing(world: int, present: Sequence[int], seconds: float, where: str, beside: Mapping[int, Identity]) -> Verdict:
    """Ranks that never came, and none more came for ``seconds``.

    Args:
        world: ranks of the job.
        present: those that came.
        seconds: since the last one.
        where: they should have come to.
        beside: processes on this host that are such ranks.
    """
    absent = [rank for rank in range(world) if rank not in present]
    known = {rank: f" ({beside[rank]}{_how(beside[rank])})" for rank in absent if rank in beside}
    listed = ", ".join(f"{rank}{known.get(rank, '')}" for rank in absent[:_MAX_LISTED])
    return Verdict(
        f"rank{'s' if len(absent) > 1 else ''} {listed}{' ...' if len(absent) > _MAX_LISTED else ''} of {world} did not come to "
        f"{where}, and nobody else did for {seconds:.0f} s: ended or stopped at the start, or on another node that cannot reach "
        "it? Their output says why. parallel.start_timeout_seconds waits longer",
        tuple(absent),
        tuple(beside[rank] for rank in absent if rank in beside),
    )


def _each(lost: Sequence[Seen], say: Any) -> str:
    words = [f"rank {one.record.rank} ({one.record.who}; {say(one)})" for one in lost[:_MAX_LISTED]]
    more = f" and {len(lost) - _MAX_LISTED} more" if len(lost) > _MAX_LISTED else ""
    return ", ".join(words) + more


def _ranks(lost: Sequence[Seen]) -> tuple[int, ...]:
    return tuple(one.record.rank for one in lost)


def _how(who: Identity) -> str:
    if not who.here:
        return ""
    states = {"T": "stopped by a signal", "t": "held by a debugger", "D": "waiting for a disk or a device"}
    known = states.get(state(who.pid))
    return f", {known}" if known else ""
