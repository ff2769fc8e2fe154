"""Packing plans: which samples share a row, and which data parallel rank gets which row. Pure functions of lengths.

    lengths of one window --best fit, longest first--> rows of at most seq_length tokens --by cost--> ranks

A plan ends with its window: nothing is carried over, so a place in the data is (epoch, window, row) and nothing else.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Cost of a row relative to one token through a decoder of about 7B parameters: attention grows with the square of a
# sample's length (4 hidden per key against 24 hidden^2 per token), a patch goes through a tower of about 0.4B. It only
# balances ranks; what is computed does not depend on it.
COST_PER_SQUARED_TOKEN = 1 / 24_576
COST_PER_PATCH = 0.06


def best_fit(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Packs samples into rows by best fit, longest first; ties go to the earlier sample and the older row.

    Args:
        lengths: tokens of each sample, each at most ``capacity``.
        capacity: tokens of a row.

    Returns:
        Rows as ascending indices into ``lengths``; every sample in exactly one row.

    Raises:
        ValueError: a sample is longer than ``capacity``.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"a sample of {lengths.max()} tokens does not fit a row of {capacity}")
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (space left, row), sorted
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        place = bisect_left(spaces, (length, 0))
        if place < len(spaces):
            space, row = spaces.pop(place)
            rows[row].append(index)
        else:
            space, row = capacity, len(rows)
            rows.append([index])
        if space > length:
            insort(spaces, (space - length, row))
    return [sorted(row) for row in rows]


def row_cost(lengths: Sequence[int], patches: Sequence[int]) -> float:
    """Returns the cost of a row of samples with these token and patch counts, in tokens of a 7B decoder."""
    return sum(n + n * n * COST_PER_SQUARED_TOKEN for n in lengths) + COST_PER_PATCH * sum(patches)


def deal(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Deals rows to ranks: the costliest first, each to the least loaded rank that has room; equal counts.

    Args:
        costs: of each row; their number is a multiple of ``num_ranks``.

    Returns:
        Ascending row indices of each rank.
    """
    share, rest = divmod(len(costs), num_ranks)
    if rest:
        raise ValueError(f"{len(costs)} rows cannot be dealt evenly to {num_ranks} ranks")
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [(0.0, rank) for rank in range(num_ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, rank = heapq.heappop(load)
        ranks[rank].append(index)
        if len(ranks[rank]) < share:
            heapq.heappush(load, (total + costs[index], rank))
    return [sorted(rank) for rank in ranks]
