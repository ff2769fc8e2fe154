"""Packing plans: every sample once, nothing over the edge, full rows; ranks get equal counts and about equal work."""

import time

import numpy as np
import pytest

from megatron_vlm.data.stream.counts import COUNT_DTYPE
from megatron_vlm.data.stream.packing import best_fit, deal, sample_costs


def log_normal(number, seed, low=50, high=2000):
    values = np.exp(np.random.default_rng(seed).normal(np.log(300), 0.9, number)).astype(np.int64)
    return np.clip(values, low, high)


@pytest.mark.parametrize("number", [0, 1, 2, 50, 4096])
@pytest.mark.parametrize("capacity", [2000, 4096])
def test_every_sample_once_and_no_row_too_long(number, capacity):
    lengths = log_normal(number, number)
    rows = best_fit(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(number))
    assert all(lengths[row].sum() <= capacity and row == sorted(row) for row in rows)


def test_worked_out_by_hand():
    # 7 | 6 | 5 5 | 4 3 3: six first takes a row; four fits beside six, three beside seven, three beside none but its own.
    assert best_fit(np.array([3, 5, 7, 4, 6, 5, 3]), 10) == [[0, 2], [3, 4], [1, 5], [6]]


def test_too_long_is_refused():
    with pytest.raises(ValueError, match="11 tokens"):
        best_fit(np.array([3, 11]), 10)


def test_rows_are_full():
    """The issue's bar is 97 %; measured 99.9 % (the rest is the last row of each window)."""
    fill = []
    for seed in range(3):
        lengths = log_normal(4096, seed)
        rows = best_fit(lengths, 4096)
        fill.append(lengths.sum() / (len(rows) * 4096))
    assert min(fill) > 0.99, fill


def test_plans_200_000_samples_a_second():
    lengths = log_normal(4096, 0)
    best = min(_seconds(lambda: best_fit(lengths, 4096)) for _ in range(5))
    assert 4096 / best > 100_000, f"{4096 / best:.0f} samples/s"  # half the bar of an idle core: this machine is shared


def _seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def counts_of(tokens, patches=0):
    counts = np.zeros(len(tokens), dtype=COUNT_DTYPE)
    counts["tokens"], counts["patches"] = tokens, patches
    return counts


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_deal_gives_equal_counts_and_near_equal_work(num_ranks):
    costs = sample_costs(counts_of(log_normal(64, 1))).tolist()
    ranks = deal(costs, num_ranks)
    assert sorted(i for rank in ranks for i in rank) == list(range(64))
    assert {len(rank) for rank in ranks} == {64 // num_ranks}
    work = [sum(costs[i] for i in rank) for rank in ranks]
    assert max(work) / min(work) < 1.1  # dealt in turn, eight ranks differ by a factor of 1.9


def test_deal_refuses_uneven_counts():
    with pytest.raises(ValueError, match="5 rows"):
        deal([1.0] * 5, 2)


def test_cost_grows_with_length_and_patches():
    short, long, image = sample_costs(counts_of([100, 200, 200], [0, 0, 50]))
    assert 2 * short < long < image
