"""Several sources in exact shares: (epoch, window) -> sample ids, a pure function without any list in memory.

    source i    its own endless order, epoch after epoch of its own: 0 .. N_i-1 shuffled, then shuffled anew ...
    epoch       the next n_i samples of every source: n_i = N_i, repeat x N_i, a weight's share, or k x 1000
    windows     W of them: window w reads positions [n_i w / W, n_i (w + 1) / W) of every source, mixed with each other

So each window holds every source in its share to within a sample, an epoch holds exactly n_i, and samples of a source
are used equally often to within one: a source read 0.3 times gives other samples in the next epoch, and one read 2.5
times repeats none before it has given all. Any place is found from a few integers.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.config import SourceConfig
from megatron_vlm.data.order import Order, permute
from megatron_vlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Source:
    """Neighbouring samples that are read in one order.

    Attributes:
        name: of the folder, or of a source file in it.
        first: id of the first sample.
        samples: N, their number.
        per_epoch: n, how many of them an epoch reads.
    """

    name: str
    first: int
    samples: int
    per_epoch: int


class Mixture:
    """The order of several sources.

    Args:
        sources: with at least one sample an epoch between them.
        seed: of the order; None: samples come as they lie, not shuffled.
        window: positions that a window has about.
        slice_size, window_slices: see Order.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seed: int | None,
        window: int,
        slice_size: int = 128,
        window_slices: int = 64,
    ):
        self.sources, self.seed = tuple(sources), seed
        self.num_positions = sum(source.per_epoch for source in sources)
        self.num_windows = -(-self.num_positions // window)
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

    def _draw(self, number: int, epoch: int, window: int) -> NDArray[np.int64]:
        """Returns what a source gives to a window: ``start .. end`` of its endless order."""
        source = self.sources[number]
        start, end = (epoch * source.per_epoch + source.per_epoch * w // self.num_windows for w in (window, window + 1))
        parts = [np.empty(0, dtype=np.int64)]
        while start < end:
            round_, position = divmod(start, source.samples)
            stop = min(source.samples, position + end - start)
            positions = np.arange(position, stop, dtype=np.int64)
            ids = positions if self.seed is None else self._orders[number](round_, positions)
            parts.append(source.first + ids)
            start += stop - position
        return np.concatenate(parts)


def resolve(
    folders: Sequence[Sequence[tuple[str, int, int, int]]], settings: Sequence[SourceConfig]
) -> tuple[Source, ...]:
    """Settles how many samples of each source an epoch reads.

    Args:
        folders: of each data folder its sources as the manifest has them: (name, first id, samples, samples an epoch).
        settings: of each folder; its weight, repeat or per_epoch is shared by its sources as their own numbers are.

    Returns:
        The sources; those of a folder that are neighbours and read once an epoch are one.

    Raises:
        ConfigError: folders with a weight beside folders without, or nothing to read.
    """
    weighted = [setting for setting in settings if setting.weight is not None]
    if weighted and len(weighted) != len(settings):
        without = next(setting.path for setting in settings if setting.weight is None)
        raise ConfigError(
            f"data.train gives a weight to {weighted[0].path} and none to {without}: give one to all, or use repeat"
        )
    own = [sum(source[3] for source in folder) for folder in folders]
    if weighted:
        total = sum(source[2] for folder in folders for source in folder)
        wanted = share(total, [setting.weight or 0 for setting in settings])
    else:
        wanted = [
            setting.per_epoch or _rounded(number * Fraction(setting.repeat or 1))
            for number, setting in zip(own, settings)
        ]
    sources: list[Source] = []
    for folder, setting, number in zip(folders, settings, wanted):
        start = len(sources)
        quotas = share(
            number, [source[3] for source in folder] if number and any(s[3] for s in folder) else [s[2] for s in folder]
        )
        for (name, first, samples, _), quota in zip(folder, quotas):
            label = f"{setting.path}:{name}" if len(folder) > 1 else setting.path
            plain = quota == samples
            if plain and len(sources) > start and sources[-1].per_epoch == sources[-1].samples:
                last = sources.pop()
                samples, quota, first, label = last.samples + samples, last.samples + samples, last.first, setting.path
            sources.append(Source(name=label, first=first, samples=samples, per_epoch=quota))
    if not sum(source.per_epoch for source in sources):
        raise ConfigError("data.train reads nothing: every source's share of an epoch is below half a sample")
    return tuple(sources)


def share(total: int, weights: Sequence[float]) -> list[int]:
    """Splits ``total`` in proportion to ``weights`` by largest remainder, exactly; ties go to the earlier one."""
    exact = [Fraction(weight) for weight in weights]
    quotas = [total * weight / sum(exact) for weight in exact]
    out = [int(quota) for quota in quotas]
    order = sorted(range(len(quotas)), key=lambda i: (out[i] - quotas[i], i))
    for i in order[: total - sum(out)]:
        out[i] += 1
    return out


def _rounded(number: Fraction) -> int:
    return int(number + Fraction(1, 2))
