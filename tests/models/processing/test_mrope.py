"""Positions of text and images by hand. Equal to transformers' on real conversations: the families' own tests."""

import pytest
import torch

from megatron_vlm.models.processing.mrope import mrope_positions


def test_by_hand():
    images = torch.tensor([0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
    time, row, column = mrope_positions(images, [(1, 2, 3), (1, 1, 1)]).tolist()
    assert time == [0, 1, 1, 1, 1, 1, 1, 4, 5, 6, 7]  # text goes on at 1 + max(2, 3)
    assert row == [0, 1, 1, 1, 2, 2, 2, 4, 5, 6, 7]
    assert column == [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7]
    assert torch.equal(mrope_positions(torch.zeros(4, dtype=torch.bool), []), torch.arange(4).expand(3, -1))


def test_neighbours_and_frames():
    images = torch.tensor([1, 1, 1, 1, 1, 0], dtype=torch.bool)
    assert mrope_positions(images, [(2, 1, 2), (1, 1, 1)]).tolist() == [
        [0, 0, 1, 1, 2, 3],
        [0, 0, 0, 0, 2, 3],
        [0, 1, 0, 1, 2, 3],
    ]
    with pytest.raises(ValueError, match=r"5 tokens of images for grids of \[\(1, 2, 2\)\]"):
        mrope_positions(images, [(1, 2, 2)])


def test_time_of_a_video_goes_by_its_seconds():
    """Of 2.6 positions a pair the whole ones; the text behind goes on at the larger side of a frame."""
    held = torch.tensor([False] + [True] * 8 + [False] * 2)
    found = mrope_positions(held, [(4, 1, 2)], [2.6])
    assert found.tolist() == [
        [0, 1, 1, 3, 3, 6, 6, 8, 8, 3, 4],
        [0, 1, 1, 1, 1, 1, 1, 1, 1, 3, 4],
        [0, 1, 2, 1, 2, 1, 2, 1, 2, 3, 4],
    ]
