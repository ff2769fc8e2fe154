"""The order is a bijection for every size, shuffles well, and costs nothing to enter anywhere."""

import time

import numpy as np
import pytest
from scipy import stats

from megatron_vlm.data.stream.order import Order, permute


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 1000, 4097, 65_537, 1_000_003])
def test_permute_is_a_bijection(n):
    out = permute(np.arange(n), n, "key")
    assert out.dtype == np.int64
    assert np.array_equal(np.sort(out), np.arange(n))


@pytest.mark.parametrize("num_samples", [1, 2, 7, 127, 128, 129, 1000, 20_011, 100_000])
@pytest.mark.parametrize("slice_size, window_slices", [(1, 1), (1, 64), (7, 3), (128, 64), (128, 1), (1000, 1000)])
def test_order_is_a_bijection_every_epoch(num_samples, slice_size, window_slices):
    order = Order(num_samples=num_samples, seed=3, slice_size=slice_size, window_slices=window_slices)
    for epoch in (0, 1, 5):
        ids = order(epoch, np.arange(num_samples))
        assert np.array_equal(np.sort(ids), np.arange(num_samples))


def test_order_is_a_function_of_seed_epoch_and_position_alone():
    n = 5000
    order = Order(num_samples=n, seed=1, slice_size=16, window_slices=8)
    whole = order(2, np.arange(n))
    parts = [order(2, np.arange(start, min(start + 37, n))) for start in range(0, n, 37)]
    assert np.array_equal(np.concatenate(parts), whole)
    scattered = np.random.default_rng(0).permutation(n)
    assert np.array_equal(order(2, scattered), whole[scattered])
    for other in (
        order(3, np.arange(n)),
        Order(num_samples=n, seed=2, slice_size=16, window_slices=8)(2, np.arange(n)),
    ):
        assert (other == whole).mean() < 0.01


def test_a_golden_order_that_checkpoints_rely_on():
    order = Order(num_samples=1000, seed=1234, slice_size=8, window_slices=4)
    assert order(0, np.arange(10)).tolist() == [767, 621, 204, 764, 202, 761, 617, 618, 760, 13]


def test_windows_read_whole_slices():
    order = Order(num_samples=128 * 100 + 5, seed=1, slice_size=128, window_slices=10)
    for window in range(10):
        ids = order(0, np.arange(window * 1280, (window + 1) * 1280))
        slices, counts = np.unique(ids // 128, return_counts=True)
        assert len(slices) == 10 and (counts == 128).all()


@pytest.mark.parametrize("slice_size", [1, 128])
def test_batches_mix_shards_as_chance_would(slice_size):
    """Chi-square of shard against batch: 40 shards of 1,000, batches of 500, windows of 8,192 positions."""
    n, shard, batch = 40_000, 1000, 500
    pvalues = []
    for seed in range(8):
        order = Order(num_samples=n, seed=seed, slice_size=slice_size, window_slices=8192 // slice_size)
        if slice_size == 1:
            ids, counts = order(0, np.arange(n)), np.full(n // shard, batch / (n // shard))
            table = np.array([np.bincount(part // shard, minlength=n // shard) for part in np.split(ids, n // batch)])
        else:  # within a window, against what the window holds
            ids = order(0, np.arange(8192))[: 16 * batch]
            held = np.bincount(order(0, np.arange(8192)) // shard, minlength=n // shard)
            counts = held[held > 0] * batch / 8192
            table = np.array([np.bincount(p // shard, minlength=n // shard)[held > 0] for p in np.split(ids, 16)])
        chi2 = ((table - counts) ** 2 / counts).sum()
        pvalues.append(stats.chi2.sf(chi2, (table.shape[0] - 1) * (table.shape[1] - 1)))
    # Drawing without replacement is a little more even than the chi-square law: p leans to 1, never to 0.
    assert min(pvalues) > 1e-3


def test_positions_and_ids_are_not_correlated():
    n = 100_000
    correlations = []
    for seed in range(20):
        ids = permute(np.arange(n), n, f"{seed}")
        correlations += [np.corrcoef(np.arange(n), ids)[0, 1], np.corrcoef(ids[:-1], ids[1:])[0, 1]]
    # Ideal: a standard deviation of 1 / sqrt(n) = 0.0032. Four rounds give almost twice that.
    assert np.sqrt(np.mean(np.square(correlations))) < 1.4 / np.sqrt(n)


def test_a_billion_samples_cost_nothing():
    order = Order(num_samples=1_000_000_007, seed=1)
    start = time.perf_counter()
    ids = order(7, np.arange(900_000_000, 900_004_096))
    assert time.perf_counter() - start < 0.5  # measured: 5 ms
    assert len(np.unique(ids)) == 4096 and ids.max() < 1_000_000_007
