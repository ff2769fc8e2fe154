"""Where each rank of a job stands: the one place that does arithmetic on ranks. No processes, no torch.

    Grid(tp, cp, dp, pp) --rank number--> coordinates, groups along any axes, the source of each

The order is megatron-core's "tp-cp-ep-dp-pp": ranks next to one another differ in tp, those farthest apart in pp. Axes:

    tp   ranks that split each matrix
    cp   ranks that split each row's tokens
    dp   replicas of the model, each with rows of its own
    pp   stages that split the layers
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from megatron_vlm.errors import ConfigError

Axis = Literal["tp", "cp", "dp", "pp"]

AXES: tuple[Axis, ...] = ("tp", "cp", "dp", "pp")
"""The fastest first."""

REPLICA: tuple[Axis, ...] = ("tp", "cp", "pp")
"""Axes of the ranks of one replica of the model, which share its rows."""

COPIES: tuple[Axis, ...] = ("cp", "dp")
"""Axes of the ranks that hold the same weights: their gradients are summed."""

STAGE: tuple[Axis, ...] = ("tp", "cp", "dp")
"""Axes of the ranks of one pipeline stage."""

SETTINGS: dict[Axis, str] = {
    "tp": "tensor_model_parallel_size",
    "cp": "context_parallel_size",
    "pp": "pipeline_model_parallel_size",
}
"""Settings of section ``parallel`` that give the sizes; dp is what the ranks leave."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Sizes of the four axes."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1

    @classmethod
    def of(cls, world: int, *, tp: int = 1, cp: int = 1, pp: int = 1) -> Self:
        """The grid of ``world`` ranks.

        Raises:
            ConfigError: they are not a multiple of a replica's.
        """
        unit = tp * cp * pp
        if world < 1 or world % unit:
            given = (
                [("tensor", tp), ("pipeline", pp)] if cp == 1 else [("tensor", tp), ("context", cp), ("pipeline", pp)]
            )
            names, sizes = " x ".join(name for name, _ in given), " x ".join(str(size) for _, size in given)
            raise ConfigError(
                f"world size {world} is not a multiple of {names} parallel size {sizes} = {unit}: start {unit} ranks (or a "
                "multiple), or change parallel.tensor_model_parallel_size / pipeline_model_parallel_size"
                + (" / context_parallel_size" if cp > 1 else "")
            )
        return cls(tp=tp, cp=cp, dp=world // unit, pp=pp)

    @classmethod
    def all(cls, world: int) -> Iterator[Self]:
        """Every grid of ``world`` ranks, by tp, cp and then pp."""
        sizes = [size for size in range(1, world + 1) if world % size == 0]
        for tp, cp, pp in itertools.product(sizes, sizes, sizes):
            if world % (tp * cp * pp) == 0:
                yield cls.of(world, tp=tp, cp=cp, pp=pp)

    @property
    def world(self) -> int:
        """Ranks of the job."""
        return self.size(*AXES)

    def size(self, *axes: Axis) -> int:
        """Ranks of a group along ``axes``."""
        return math.prod(getattr(self, axis) for axis in axes)

    def coordinate(self, rank: int, axis: Axis) -> int:
        """Where ``rank`` stands along ``axis``."""
        return rank // self._step(axis) % self.size(axis)

    def rank(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """The rank at these coordinates."""
        places: dict[Axis, int] = {"tp": tp, "cp": cp, "dp": dp, "pp": pp}
        return sum(place * self._step(axis) for axis, place in places.items())

    def group(self, rank: int, *axes: Axis) -> tuple[int, ...]:
        """Ranks that differ from ``rank`` along ``axes`` alone, in order."""
        start = self.source(rank, *axes)
        slowest_first = sorted(axes, key=AXES.index, reverse=True)
        steps = [range(0, self.size(axis) * self._step(axis), self._step(axis)) for axis in slowest_first]
        return tuple(start + sum(offsets) for offsets in itertools.product(*steps))

    def groups(self, *axes: Axis) -> list[tuple[int, ...]]:
        """All groups along ``axes``, by their first rank: megatron-core's order."""
        return [self.group(rank, *axes) for rank in range(self.world) if self.source(rank, *axes) == rank]

    def source(self, rank: int, *axes: Axis) -> int:
        """First rank of the group of ``rank`` along ``axes``: it broadcasts."""
        return rank - sum(self.coordinate(rank, axis) * self._step(axis) for axis in axes)

    def number(self, rank: int, *axes: Axis) -> int:
        """Which of its group along ``axes`` ``rank`` is."""
        return self.group(rank, *axes).index(rank)

    def neighbour(self, rank: int, axis: Axis, offset: int) -> int:
        """The rank ``offset`` further along ``axis``, around its end."""
        here = self.coordinate(rank, axis)
        return rank + ((here + offset) % self.size(axis) - here) * self._step(axis)

    def first(self, rank: int, axis: Axis) -> bool:
        """``rank`` is the first along ``axis``."""
        return self.coordinate(rank, axis) == 0

    def last(self, rank: int, axis: Axis) -> bool:
        """``rank`` is the last along ``axis``."""
        return self.coordinate(rank, axis) == self.size(axis) - 1

    def sizes(self) -> list[str]:
        """Of each axis in words, context parallelism where there is any."""
        return [f"tp {self.tp}", *([f"cp {self.cp}"] if self.cp > 1 else []), f"pp {self.pp}", f"dp {self.dp}"]

    def name(self) -> str:
        """All of them."""
        return " ".join(self.sizes())

    def _step(self, axis: Axis) -> int:
        """Ranks from one coordinate along ``axis`` to the next."""
        return self.size(*AXES[: AXES.index(axis)])


def replica_size(parallel: Mapping[str, Any]) -> int:
    """Ranks of one replica by a section ``parallel`` as it is written, values in text or not; what is no size counts as 1."""
    sizes = (str(parallel.get(name) or 1) for name in SETTINGS.values())
    return math.prod(int(size) if size.isdecimal() and int(size) else 1 for size in sizes)


def replicas(parallel: Mapping[str, Any], world: int) -> int:
    """Replicas of a start of ``world`` ranks by such a section; at least 1, as the run's config tells what does not divide."""
    return max(1, world // replica_size(parallel))
