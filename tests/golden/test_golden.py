"""The golden record finds what it names, says the same twice, and sees a change."""

import copy
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import golden


def test_compare_names_each_difference():
    before = {"a": {"x": [1, 2], "y": "one\ntwo"}, "b": 1}
    after = copy.deepcopy(before)
    assert not golden.compare(before, after)
    after["a"]["x"][1], after["a"]["y"], after["c"] = 3, "one\nthree", 0
    lines = golden.compare(before, after)
    assert lines == ["a.x[1]: 2 -> 3", "a.y + three", "a.y - two", "only in one record: c"]


@pytest.mark.parametrize("part", ["help", "recipes", "data"])
def test_a_record_is_the_same_twice(part):
    first = golden.record([part])
    assert len(first) > 15
    assert not golden.compare(first, golden.record([part]))


@pytest.mark.full
@pytest.mark.parametrize("part", ["conversion", "training"])
def test_a_record_of_weights_is_the_same_twice(part):
    first = golden.record([part])
    assert len(first) >= 12
    assert not golden.compare(first, golden.record([part]))
