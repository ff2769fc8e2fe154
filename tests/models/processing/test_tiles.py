"""Fields of processors that cut images into tiles."""

import pytest

from megatron_vlm.data.config import DataConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.processing.tiles import tile_fields

SETTINGS = {"side": 448, "dynamic": True, "min_tiles": 1, "max_tiles": 12, "thumbnail": True}


def test_the_data_section_comes_before_the_models_files():
    assert tile_fields(DataConfig(seq_length=8), SETTINGS, 14, 2) == SETTINGS | {"tile_patches": 1024}
    config = DataConfig(seq_length=8, image_size=224, max_dynamic_patch=6, use_thumbnail=False)
    asked = {"side": 224, "max_tiles": 6, "thumbnail": False, "tile_patches": 256}
    assert tile_fields(config, SETTINGS, 14, 2) == SETTINGS | asked


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"image_size": 238}, "238 pixels are not a multiple of 28: change data.image_size"),
        ({"min_dynamic_patch": 13}, "cut into 13 to 12 tiles"),
    ],
)
def test_numbers_that_cannot_work(asked, message):
    with pytest.raises(ConfigError, match=message):
        tile_fields(DataConfig(seq_length=8, **asked), SETTINGS, 14, 2)
