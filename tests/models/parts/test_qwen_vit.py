"""Costs of an image of Qwen's towers, counted by hand."""

from megatron_vlm.models.parts.qwen_vit import Qwen3VitConfig, Qwen25VitConfig
from megatron_vlm.testing.shapes import tower


def test_an_image_of_three_windows():
    options = dict(temporal_patch_size=2, block=2, window=4, full_layers=(1,), rotary_base=1e4)
    vit: Qwen25VitConfig = tower(Qwen25VitConfig, 8, 20, 3, 2, 112, **options)
    assert (vit.unit, vit.num_window_layers, vit.patch_numbers) == (28, 2, 3 * 2 * 14 * 14)
    cost = vit.image_cost((3, 3 * 28, 9 * 28), 16)
    assert (cost.features, cost.patches, cost.segments) == (27, 108, (108,))
    assert cost.windows == (48, 48, 12)  # 3 x 4, 3 x 4 and 3 x 1 blocks
    assert cost.connector == 2 * 27 * (32 * 32 + 32 * 16)


def test_levels_are_merged_too():
    options = dict(temporal_patch_size=2, block=2, levels=(0, 1), rotary_base=1e4)
    vit: Qwen3VitConfig = tower(Qwen3VitConfig, 8, 20, 3, 2, 112, **options)
    cost = vit.image_cost((3, 3 * 28, 9 * 28), 16)
    assert (vit.side, vit.num_window_layers, cost.windows, cost.segments) == (8, 0, (), (108,))
    assert cost.connector == 3 * 2 * 27 * (32 * 32 + 32 * 16)
