"""What is worth saying of records that are used all the same: counted, and told once a source."""

from collections import Counter
from collections.abc import Iterable, Iterator

from megatron_vlm.errors import DataError, Reason

_WORDS = {
    Reason.UNKNOWN_KEYS: "keys that are not known and not read",
    Reason.SPECIAL_TOKENS_AS_TEXT: "special tokens of the model in texts, which are encoded as text",
    Reason.SKIPPED_MEMBERS: "members that belong to no sample and are not read",
}
_SHOWN = 20


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
            shown = ", ".join(f"{name} ({number})" for name, number in found.most_common(_SHOWN))
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            yield DataError(f"{_WORDS[reason]}: {shown}{more}", reason=reason, shard=place)

    def lines(self) -> Iterator[str]:
        """Yields the same as text."""
        yield from map(str, self.warnings())
