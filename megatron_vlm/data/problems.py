"""What is to be said of records.

Problem   of one that a build or a check cannot use: told in a message, and kept as a line of ``rejected.jsonl``
Notes     of those that are used all the same: counted, and told once a source
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_vlm.errors import DataError, Reason

REJECTED = "rejected.jsonl"
SHOWN = 50  # problems that an error lists
_NAMES_SHOWN = 20  # names that a note lists
_WORDS = {
    Reason.UNKNOWN_KEYS: "keys that are not known and not read",
    Reason.SPECIAL_TOKENS_AS_TEXT: "special tokens of the model in texts, which are encoded as text",
    Reason.SKIPPED_MEMBERS: "members that belong to no sample and are not read",
}
_CAUSES = {
    Reason.BAD_RECORD: "most likely --format is another than that of the records, or their keys have other names",
    Reason.BAD_JSON: "most likely the file is no json, or its end is missing: look at the place that the first line names",
    Reason.MISSING_IMAGE: "most likely the paths of their pictures start from another folder than --image-root",
    Reason.UNREADABLE_IMAGE: "most likely the files were not fetched whole, unless the first line says more: open it",
    Reason.PLACEHOLDERS: "most likely the records have no <image> in their texts: --missing-placeholder prepend puts it there",
    Reason.DAMAGED_SHARD: "most likely the file was not fetched whole, or is of another kind than --format says",
}
_ANY_CAUSE = "most likely all have the fault that the first line names: correct them"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A record that cannot be used; ``record`` is -1 where the rest of a file is lost, ``key`` that of a tar's sample.

    ``reason`` is the number of a Reason: problems are kept as json.
    """

    source: int
    record: int
    file: str
    message: str
    key: str = ""
    reason: int = Reason.BAD_RECORD.number

    def __str__(self) -> str:
        where = f", record {self.record}" if self.record >= 0 else ""
        return f"{self.file}{where}{f', sample {self.key}' if self.key else ''}: {self.message}"


def describe(
    problems: Sequence[Problem], total: int, fatal: bool, *, allowed: float | None = None, hint: str = ""
) -> str:
    """Returns the text of an error: each problem, and a count by kind.

    Args:
        problems: all of them.
        total: records, these included.
        fatal: the rest of a file is lost.
        allowed: share of records that may be left out; None: none may.
        hint: the usual cause, where there is a sign of it.
    """
    kinds = Counter(Reason.numbered(problem.reason).words for problem in problems)
    shown = "\n".join(f"  {problem}" for problem in problems[:SHOWN])
    more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    counts = "\n".join(f"  {number:8d}  {kind}" for kind, number in kinds.most_common())
    advice = "correct the file: what follows a fault like this cannot be read" if fatal else (
        f"correct them, or set --on-bad-sample skip to leave them out and list them in {REJECTED}"
    )  # fmt: skip
    if not fatal and allowed is not None:
        share = f"{len(problems) / max(1, total):.1%} of the records cannot be used, and {allowed:.1%} may be left out"
        advice = f"{share} (--max-bad-fraction, data.max_bad_fraction): correct them, or allow more"
    if not fatal and len(problems) >= total:  # leaving them out would leave nothing
        common = Reason.numbered(Counter(problem.reason for problem in problems).most_common(1)[0][0])
        advice = f"not one record can be used: {'the cause above' if hint else _CAUSES.get(common, _ANY_CAUSE)}"
    cause = f"\n{hint}" if hint else ""
    return f"{len(problems)} problems in {total} records:\n{shown}{more}\nby kind:\n{counts}{cause}\n{advice}"


def rejected_line(problem: Problem) -> str:
    """The line of ``rejected.jsonl`` about a record."""
    where = {"file": problem.file, "record": problem.record, "key": problem.key, "reason": problem.message}
    where["kind"] = Reason.numbered(problem.reason).words
    return json.dumps({name: value for name, value in where.items() if name != "key" or value})


class Notes:
    """Counts of names (keys, tokens, members) by place and reason.

    Attributes:
        counts: (place, reason, name) -> number.
    """

    def __init__(self) -> None:
        self.counts = Counter[tuple[str, Reason, str]]()

    def add(self, place: str, reason: Reason, names: Iterable[str], number: int = 1) -> None:
        """Counts each name."""
        for name in names:
            self.counts[place, reason, name] += number

    def warnings(self) -> Iterator[DataError]:
        """Yields one warning for each place and reason."""
        for place, reason in dict.fromkeys((place, reason) for place, reason, _ in self.counts):
            found = Counter({n: number for (p, r, n), number in self.counts.items() if (p, r) == (place, reason)})
            shown = ", ".join(f"{name} ({number})" for name, number in found.most_common(_NAMES_SHOWN))
            more = f" and {len(found) - _NAMES_SHOWN} more" if len(found) > _NAMES_SHOWN else ""
            yield DataError(f"{_WORDS[reason]}: {shown}{more}", reason=reason, shard=place)

    def lines(self) -> Iterator[str]:
        """Yields the same as text."""
        yield from map(str, self.warnings())
