"""Decoder layers over stages: the slowest stage is as fast as it can be."""

import itertools
import random

import pytest

from megatron_vlm.weights.megatron_dir import Stages
from megatron_vlm.weights.stages import spread, spread_virtual


def largest(counts, beside, layer):
    return max(b + n * layer for b, n in zip(beside, counts))


def test_no_split_has_a_faster_slowest_stage():
    draw = random.Random(0)
    for _ in range(300):
        stages, layers = draw.randint(1, 4), draw.randint(1, 9)
        beside = [draw.choice([0.0, draw.uniform(0, 12)]) for _ in range(stages)]
        found = spread(layers, beside)
        assert sum(found) == layers
        splits = (s for s in itertools.product(range(layers + 1), repeat=stages) if sum(s) == layers)
        assert largest(found, beside, 1.0) == pytest.approx(min(largest(s, beside, 1.0) for s in splits))


@pytest.mark.parametrize("layers, stages, counts", [
    (32, 4, (8, 8, 8, 8)), (28, 8, (3, 4, 4, 4, 4, 3, 3, 3)), (5, 2, (2, 3)), (7, 3, (2, 3, 2)), (4, 3, (1, 2, 1)),
])  # fmt: skip
def test_without_more_the_layers_lie_evenly_and_the_ends_have_fewer(layers, stages, counts):
    assert spread(layers, [0.0] * stages) == counts


def test_a_heavy_tower_takes_the_first_stage_alone():
    assert spread(8, [20.0, 0.0, 0.0]) == (0, 4, 4)


def test_files_of_stages_hold_any_number_of_layers():
    stages = Stages([f"language_model.decoder.layers.{n}.mlp.linear_fc1.weight" for n in range(5)], 2)
    assert [stages.of(f"language_model.decoder.layers.{n}.mlp.linear_fc1.weight") for n in range(5)] == [0, 0, 1, 1, 1]
    assert stages.of("vision_model.x") == 0 and stages.of("language_model.output_layer.weight") == 1


def test_the_first_of_virtual_stages_has_as_many_as_are_asked_for():
    tower = [6.0, 0.0]
    assert spread_virtual(12, tower, 1.0, 2) == (0, 4, 3, 5)
    assert spread_virtual(12, tower, 1.0, 2, first=3) == (3, 4, 0, 5)
    assert spread_virtual(16, [0.0, 0.0], 1.0, 2, first=3) == spread_virtual(16, [0.0, 0.0], 1.0, 2)
    assert spread_virtual(4, [9.0, 0.0], 1.0, 2, first=3)[0] == 3
