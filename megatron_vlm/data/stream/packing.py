"""Packing plans: which samples share a row, and which data parallel rank gets which row. Pure functions of lengths.

    lengths of one window --best fit, longest first--> rows of at most seq_length tokens --by cost--> ranks

A plan ends with its window: nothing is carried over, so a place in the data is (epoch, window, row) and nothing else.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Where the model is not known (training/balance.py:costs_of): cost of a row relative to one token through a decoder of about
# 7B parameters. Attention grows with the square of a sample's length (4 hidden per key against 24 hidden^2 per token), a patch
# goes through a tower of about 0.4B. It only balances ranks; what is computed does not depend on it.
COST_PER_SQUARED_TOKEN = 1 / 24_576
COST_PER_PATCH = 0.06
Costs = Callable[[NDArray[Any]], NDArray[np.float64]]
"""Counts of samples (``COUNT_DTYPE``) -> what each costs a rank, in any unit."""
ROW_BITS = 32
ROW_MASK = (1 << ROW_BITS) - 1


def best_fit(
    lengths: NDArray[np.int64],
    capacity: int,
    patches: NDArray[np.int64] | None = None,
    max_patches: int | None = None,
) -> list[list[int]]:
    """Packs samples into rows by best fit, longest first; ties go to the earlier sample and the older row.

    Args:
        lengths: tokens of each sample, each at most ``capacity``.
        capacity: tokens of a row.
        patches: image patches of each sample, each at most ``max_patches``.
        max_patches: of a row; None: no limit, ``patches`` are not looked at.

    Returns:
        Rows as ascending indices into ``lengths``; every sample in exactly one row.

    Raises:
        ValueError: a sample is beyond a limit by itself.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"a sample of {lengths.max()} tokens does not fit a row of {capacity}")
    costs, most = [0] * len(lengths), 0
    if patches is not None and max_patches is not None:
        if len(patches) and patches.max() > max_patches:
            raise ValueError(f"a sample of {patches.max()} patches does not fit a row of {max_patches}")
        costs, most = patches.tolist(), max_patches
    rows: list[list[int]] = []
    room: list[int] = []  # patches that each row can still take
    spaces: list[int] = []  # space left << ROW_BITS | row, sorted: whole numbers compare faster than pairs
    sizes = lengths.tolist()
    for index in np.argsort(-lengths, kind="stable").tolist():
        length, cost = sizes[index], costs[index]
        place = bisect_left(spaces, length << ROW_BITS)
        while cost and place < len(spaces) and room[spaces[place] & ROW_MASK] < cost:
            place += 1
        if place < len(spaces):
            entry = spaces.pop(place)
            row = entry & ROW_MASK
            rows[row].append(index)
        else:
            row = len(rows)
            entry = capacity << ROW_BITS | row
            rows.append([index])
            room.append(most)
        room[row] -= cost
        entry -= length << ROW_BITS
        if entry > ROW_MASK:
            insort(spaces, entry)
    for members in rows:
        members.sort()
    return rows


def sample_costs(counts: NDArray[Any]) -> NDArray[np.float64]:
    """Returns the cost of samples (``COUNT_DTYPE``) where no model is known: tokens of a 7B decoder; a row's is the sum."""
    lengths, patches = counts["tokens"].astype(np.float64), counts["patches"]
    return lengths + lengths**2 * COST_PER_SQUARED_TOKEN + COST_PER_PATCH * patches


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
