"""Images as InternVL's towers see them: dynamic tiles of one size, a processor's fields and what it makes of an image."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images import tiling
from megatron_vlm.data.images.pictures import degrade
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.processing.pixels import NormalisedPixels

TilePlan = tuple[int, int]
"""Of an image: most tiles it may be cut into, and the tiles it becomes, with its thumbnail."""
TILE_SETTINGS = ("image_size", "dynamic_image_size", "min_dynamic_patch", "max_dynamic_patch", "use_thumbnail")
"""Fields of DataConfig that ``tile_fields`` reads."""


@dataclass(frozen=True, kw_only=True)
class DynamicTiles(NormalisedPixels):
    """Fields of a processor that cuts images into tiles.

    Attributes:
        side: of a tile, in pixels.
        tile_patches: patches of the tower of one tile.
        dynamic: images are cut into tiles; else each is one.
        min_tiles, max_tiles: of an image without its thumbnail; a data set may have its own ``max_tiles``.
        thumbnail: an image of several tiles is seen as a whole, too.
    """

    side: int
    tile_patches: int
    dynamic: bool
    min_tiles: int
    max_tiles: int
    thumbnail: bool

    def tile_plan(self, size: tuple[int, int], most: int) -> TilePlan:
        """Plan of an image of (width, height) that may become ``most`` tiles."""
        return most, tiling.num_tiles(*size, self.side, min(self.min_tiles, most), most, self.thumbnail)

    def tiles(self, pixels: torch.Tensor) -> tuple[int, int]:
        """See data.types.Processor."""
        return self.side, min(4, pixels.shape[1] // self.side)

    def patches(self, plan: TilePlan) -> int:
        """Patches that the tower sees of an image."""
        return plan[1] * self.tile_patches

    def views(self, image: Image.Image, plan: TilePlan, draw: random.Random | None) -> list[torch.Tensor]:
        """Pixels of an upright RGB image, float32 [3, tiles * side, side]; ``draw`` where it is augmented."""
        most = plan[0]
        cut = tiling.tiles(image, self.side, min(self.min_tiles, most), most, self.thumbnail, self.resample)
        return [self.normalised(*([degrade(tile, draw) for tile in cut] if draw else cut))]


def tile_fields(config: DataConfig, settings: dict[str, Any], patch_size: int, shuffle: int) -> dict[str, Any]:
    """Fields of ``DynamicTiles``: as the model's files say, but for what the data section asks for.

    Args:
        config: the data section.
        settings: all but ``tile_patches``, by the model's files.
        patch_size: of the tower.
        shuffle: side of the block of patches that becomes one token.

    Raises:
        ConfigError: numbers that cannot work.
    """
    asked = {
        "side": config.image_size,
        "dynamic": config.dynamic_image_size,
        "min_tiles": config.min_dynamic_patch,
        "max_tiles": config.max_dynamic_patch,
        "thumbnail": config.use_thumbnail,
    }
    fields = settings | {name: value for name, value in asked.items() if value is not None}
    if fields["side"] % (patch_size * shuffle):
        raise ConfigError(
            f"tiles of {fields['side']} pixels are not a multiple of {patch_size * shuffle}: change data.image_size"
        )
    if not 1 <= fields["min_tiles"] <= fields["max_tiles"]:
        raise ConfigError(
            f"an image is cut into {fields['min_tiles']} to {fields['max_tiles']} tiles: set "
            "data.min_dynamic_patch and data.max_dynamic_patch to 1 or more, in order"
        )
    return {**fields, "tile_patches": (fields["side"] // patch_size) ** 2}
