"""The simulated clock, against steps that are counted by hand."""

import pytest

from megatron_vlm.parallel.pipeline_time import step_seconds, step_work


def test_a_step_on_the_clock():
    assert step_seconds([[1, 1, 1]], [[2, 2, 2]]) == 9
    assert step_seconds([[1.0] * 5] * 3, [[2.0] * 5] * 3) == pytest.approx(
        3 * (5 + 3 - 1)
    )  # even stages: m + p - 1 of them
    # F0 F1 B0 B1 on both: the second stage is the slower one, and the first waits for each of its backward passes.
    assert step_seconds([[1, 1], [3, 3]], [[1, 1], [3, 3]]) == 1 + 12 + 1
    assert (
        step_seconds([[1, 5], [1, 1]], [[1, 1], [1, 1]]) == 1 + 5 + 1 + 1 + 1
    )  # a microbatch with images in the first stage


def test_microbatches_that_are_alike():
    assert step_work([3.0], 5) == 15 and step_work([1.0, 1.0], 7) == pytest.approx(8)  # microbatches + ranks - 1
    for loads in ([2.0, 1.0, 1.0, 1.0], [1.0, 1.0, 2.0, 1.0], [1.0, 1.0, 1.0, 2.0]):
        whole = step_seconds(*([[share * load] * 40 for load in loads] for share in (1 / 3, 2 / 3)))
        assert step_work(loads, 40) == pytest.approx(whole)
        # (microbatches - 1) x slowest + all is a bound: where the first rank is the slowest, few of its rows wait.
        assert 0.9 < whole / (39 * max(loads) + sum(loads)) <= 1.0001
