"""Angles of packed rows, with each scaling, by the formulas."""

import pytest
import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.layers.rope import RopeScaling, RotaryAngles

POSITIONS = torch.cat((torch.arange(4), torch.arange(12)))  # a segment of 4 tokens and one of 12
CU = torch.tensor([0, 4, 16], dtype=torch.int32)
EXPONENTS = torch.arange(0, 8, 2) / 8


def angles(scaling=None, **more):
    found = RotaryAngles(8, 100.0, 6, scaling, torch.device("cpu"))(POSITIONS, CU, CU, 12, **more)
    assert found.shape == (16, 1, 1, 8) and found.dtype == torch.float32
    assert torch.equal(found[..., :4], found[..., 4:])
    return found[:, 0, 0, :4]


def test_plain_and_linear():
    expected = POSITIONS[:, None] * 100.0**-EXPONENTS
    assert torch.allclose(angles(), expected, rtol=1e-6)
    assert torch.allclose(angles(RopeScaling(rope_type="linear", factor=4.0)), expected / 4, rtol=1e-6)


def test_dynamic_stretches_the_segments_that_are_too_long_alone():
    found = angles(RopeScaling(rope_type="dynamic", factor=2.0))
    assert torch.allclose(found[:4], angles()[:4], rtol=1e-6)
    base = 100.0 * (2.0 * 12 / 6 - 1) ** (8 / 6)
    assert torch.allclose(found[4:], torch.arange(12)[:, None] * base**-EXPONENTS, rtol=1e-5)
    of_tokens = torch.tensor([0] * 4 + [1] * 12)
    assert torch.equal(found, angles(RopeScaling(rope_type="dynamic", factor=2.0), segments=of_tokens))


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones():
    scaling = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=64)
    plain, found = angles(), angles(scaling)
    # wavelengths 6.3, 20, 63 and 199: kept below 64 / 4, stretched above 64, blended between
    assert torch.equal(found[:, 0], plain[:, 0]) and torch.allclose(found[:, 3], plain[:, 3] / 8, rtol=1e-6)
    smooth = (64 / (2 * torch.pi * 100.0 ** EXPONENTS[1]) - 1) / 3
    assert torch.allclose(found[:, 1], plain[:, 1] * ((1 - smooth) / 8 + smooth), rtol=1e-5)


def test_a_factor_below_one_is_refused():
    with pytest.raises(ConfigError, match=r"at least 1, got 0\.5"):
        RopeScaling(rope_type="linear", factor=0.5)


def test_three_positions_a_token_turn_their_own_dimensions():
    rotary = RotaryAngles(8, 100.0, 6, None, torch.device("cpu"), (0, 1, 1, 2))
    time, row, column = POSITIONS, POSITIONS * 3 + 1, POSITIONS * 7 % 5
    found = rotary(torch.stack([time, row, column]), CU, CU, 12)[:, 0, 0]
    one_by_one = [rotary(positions, CU, CU, 12)[:, 0, 0] for positions in (time, row, column)]
    expected = torch.stack([one_by_one[axis][:, i] for i, axis in enumerate((0, 1, 1, 2))], 1)
    assert torch.equal(found, torch.cat((expected, expected), 1))
    assert torch.equal(one_by_one[0][:, :4], angles())  # a token of one position: as without axes
