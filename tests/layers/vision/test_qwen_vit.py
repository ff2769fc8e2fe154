"""Windows of Qwen2.5-VL's tower: the order of patches against transformers' own, and what is no image of it."""

from types import SimpleNamespace

import pytest
import torch
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from megatron_vlm.errors import DataError
from megatron_vlm.layers.vision.qwen_vit import QwenVisionModel, order


@pytest.mark.parametrize("rows, columns", [(1, 1), (2, 2), (3, 5), (4, 4), (1, 9), (9, 2), (7, 6)])
@pytest.mark.parametrize("block, window", [(2, 2), (2, 4), (3, 2)])
def test_order_is_that_of_transformers(rows, columns, block, window):
    grid = torch.tensor([[1, rows * block, columns * block]])
    index, starts = get_vision_window_index(grid, block, window * block * 10, 10)
    positions = get_vision_position_ids(grid, block).unflatten(0, (-1, block * block))[index].flatten(0, 1)
    found = order(rows, columns, block, window)
    assert torch.equal(found.positions, positions)
    assert torch.equal(found.patches, positions[:, 0] * columns * block + positions[:, 1])
    assert list(found.windows) == starts.diff().tolist()
    assert torch.equal(found.back, torch.argsort(index))


def test_an_image_of_broken_blocks_is_refused():
    options = dict(
        hidden_size=8, patch_size=4, temporal_patch_size=2, num_channels=3, block=2, window=2, rotary_base=1e4
    )
    tower = QwenVisionModel(SimpleNamespace(), dtype=torch.float32, device=torch.device("cpu"), **options)  # type: ignore[arg-type]
    for size in ((8, 12), (4, 8), (0, 8)):
        with pytest.raises(DataError, match=f"{size[1]}x{size[0]} pixels is not of whole blocks of 8x8"):
            tower([torch.zeros(3, *size)])
