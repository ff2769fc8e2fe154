"""Several sources in exact shares: (epoch, window) -> sample ids, a pure function without any list in memory.

    source i    its own endless order, epoch after epoch of its own: 0 .. N_i-1 shuffled, then shuffled anew ...
    share       q_i samples an epoch, a fraction: N_i, repeat x N_i, a weight's share, or k x 1000
    windows     W an epoch: after t windows (t / W epochs) source i has given t q_i / W samples, rounded

Only the total since the start is rounded, never an epoch's part of it: what one epoch lacks the next one gives, and after
as many epochs as make q_i whole the count is exact. So each window holds every source in its share to within a sample, and
samples of a source are used equally often to within one: a source read 0.3 times gives other samples in the next epoch,
and one read 2.5 times repeats none before it has given all. Any place is found from a few integers.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.config import SourceConfig
from megatron_vlm.data.stream.order import Order, permute
from megatron_vlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """Neighbouring samples that are read in one order.

    Attributes:
        name: of the folder, or of a source file in it.
        first: id of the first sample.
        samples: N, their number.
        per_epoch: q, how many of them an epoch reads in the mean.
    """

    name: str
    first: int
    samples: int
    per_epoch: Fraction | int


class Mixture:
    """The order of several sources.

    Args:
        sources: of which something is read.
        seed: of the order; None: samples come as they lie, not shuffled.
        window: positions that a window has about.
        slice_size, window_slices: see Order.

    Attributes:
        num_windows: W, of every epoch.
    """

    def __init__(
        self,
        sources: Sequence[MixtureSource],
        *,
        seed: int | None,
        window: int,
        slice_size: int = 128,
        window_slices: int = 64,
    ):
        self.sources, self.seed = tuple(sources), seed
        self.num_windows = max(1, math.ceil(sum(source.per_epoch for source in sources) / Fraction(window)))
        self._phases = _phases(self.sources)
        self._orders = [
            Order(
                num_samples=source.samples,
                seed=f"{seed}/{number}" if number else str(seed),
                slice_size=slice_size,
                window_slices=window_slices,
            )
            for number, source in enumerate(self.sources)
        ]

    @property
    def digest(self) -> str:
        """Hex digest of the sources and their shares."""
        text = " ".join(f"{source.first}+{source.samples}:{source.per_epoch}" for source in self.sources)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def ids(self, epoch: int, window: int) -> NDArray[np.int64]:
        """Returns the sample ids (int64) of a window of an epoch, in order."""
        parts = [self._draw(number, epoch, window) for number in range(len(self.sources))]
        ids = np.concatenate(parts)
        if self.seed is None or len(parts) == 1:
            return ids
        return ids[permute(np.arange(len(ids)), len(ids), f"{self.seed}/{epoch}/mix/{window}")]

    def taken(self, number: int, epoch: int, window: int = 0) -> int:
        """Returns the samples that a source has given before a window of an epoch, over all epochs."""
        exact = self.sources[number].per_epoch * Fraction(epoch * self.num_windows + window, self.num_windows)
        phase, down = self._phases[number]
        return math.ceil(exact - phase) if down else math.floor(exact + phase)

    def num_positions(self, epochs: int) -> int:
        """Returns the samples of the first ``epochs`` epochs."""
        return sum(self.taken(number, epochs) for number in range(len(self.sources)))

    def require_all(self, epochs: int) -> None:
        """Refuses sources that give nothing to the first ``epochs`` epochs.

        Raises:
            ConfigError: their names, sizes and shares, and the epochs that they would need.
        """
        problems = []
        for number, source in enumerate(self.sources):
            if self.taken(number, epochs):
                continue
            phase, down = self._phases[number]
            needed = math.floor(phase / source.per_epoch) + 1 if down else math.ceil((1 - phase) / source.per_epoch)
            problems.append(
                f"{source.name}: {source.samples} samples, share {float(source.per_epoch):.4g} of a sample an epoch, first "
                f"read in epoch {needed}"
            )
        if problems:
            length = f"{epochs} epoch{'s' if epochs > 1 else ''}"
            raise ConfigError(
                f"data.train has sources that this run ({length}) never reads: raise their weight, repeat or per_epoch, train "
                "longer, or leave them out:\n  " + "\n  ".join(problems)
            )

    def _draw(self, number: int, epoch: int, window: int) -> NDArray[np.int64]:
        """Returns what a source gives to a window: ``start .. end`` of its endless order."""
        source = self.sources[number]
        start, end = (self.taken(number, epoch, w) for w in (window, window + 1))
        parts = [np.empty(0, dtype=np.int64)]
        while start < end:
            round_, position = divmod(start, source.samples)
            stop = min(source.samples, position + end - start)
            positions = np.arange(position, stop, dtype=np.int64)
            ids = positions if self.seed is None else self._orders[number](round_, positions)
            parts.append(source.first + ids)
            start += stop - position
        return np.concatenate(parts)


def _phases(sources: Sequence[MixtureSource]) -> list[tuple[Fraction, bool]]:
    """Returns of each source what is added before its total is rounded down (or, with True, taken off before it is rounded up).

    Whole shares need none. The others are spread, so that they do not give their extra samples in the same epochs: two weights
    make epochs of one size, and of m sources all epochs together are off by less than m.
    """
    broken = [number for number, source in enumerate(sources) if source.per_epoch % 1]
    phases = [(Fraction(0), False)] * len(sources)
    for place, number in enumerate(broken):
        phase = Fraction(2 * place + 1, 2 * len(broken))
        phases[number] = (phase, False) if phase <= Fraction(1, 2) else (1 - phase, True)
    return phases


def resolve(
    folders: Sequence[Sequence[tuple[str, int, int, Fraction]]], settings: Sequence[SourceConfig]
) -> tuple[MixtureSource, ...]:
    """Settles how many samples of each source an epoch reads.

    Args:
        folders: of each data folder its sources as the manifest has them: (name, first id, samples, samples an epoch).
        settings: of each folder; its weight, repeat or per_epoch is shared by its sources as their own numbers are.

    Returns:
        The sources; those of a folder that are neighbours and read once an epoch are one.

    Raises:
        ConfigError: folders with a weight beside folders without, or a source without any share.
    """
    weighted = [setting for setting in settings if setting.weight is not None]
    if weighted and len(weighted) != len(settings):
        without = next(setting.path for setting in settings if setting.weight is None)
        raise ConfigError(
            f"data.train gives a weight to {weighted[0].path} and none to {without}: give one to all, or use repeat"
        )
    total = sum(source[2] for folder in folders for source in folder)
    weights = sum(exactly(setting.weight or 0) for setting in settings)
    sources: list[MixtureSource] = []
    for folder, setting in zip(folders, settings):
        start = len(sources)
        own = sum(source[3] for source in folder)
        if setting.weight is not None:
            wanted = total * exactly(setting.weight) / weights
        else:
            wanted = Fraction(setting.per_epoch) if setting.per_epoch else own * exactly(setting.repeat or 1)
        for name, first, samples, number in folder:
            quota = wanted * number / own if own else Fraction(0)
            label = f"{setting.path}:{name}" if len(folder) > 1 else setting.path
            if not quota:
                raise ConfigError(f"{label} has {samples} samples and a share of 0: nothing reads it, leave it out")
            plain = quota == samples
            if plain and len(sources) > start and sources[-1].per_epoch == sources[-1].samples:
                last = sources.pop()
                samples, first, label = last.samples + samples, last.first, setting.path
                quota = Fraction(samples)
            sources.append(MixtureSource(name=label, first=first, samples=samples, per_epoch=quota))
    return _told_apart(sources)


def _told_apart(sources: Sequence[MixtureSource]) -> tuple[MixtureSource, ...]:
    """Numbers sources of one name (a folder given twice): reports go by name."""
    seen: Counter[str] = Counter()
    told = []
    for source in sources:
        seen[source.name] += 1
        number = seen[source.name]
        told.append(source if number == 1 else replace(source, name=f"{source.name} ({number})"))
    return tuple(told)


def exactly(number: float) -> Fraction:
    """Returns the number as it is written: 0.1 is a tenth, not the nearest binary fraction.

    Raises:
        ValueError: it is not finite.
    """
    return Fraction(str(number))
