"""What a family's config tells the house, beside what the family's own files read in it.

config.json --FamilySpec.config--> FamilyConfig (a text model) | ImageConfig (a model with a tower)
"""

from typing import Any, Protocol, TypeGuard

from megatron_vlm.data.config import DataConfig
from megatron_vlm.models.parts.decoder import TextConfig
from megatron_vlm.models.parts.tower import TowerConfig
from megatron_vlm.models.processing.image_cost import ImageCost, tower_flops

ImageShape = tuple[int, int, int]
"""[C, H, W] of an image as the tower gets it (InternVL: a column of tiles)."""


class FamilyConfig(Protocol):
    """Of any model: a frozen dataclass of plain values."""

    @property
    def text(self) -> TextConfig:
        """The decoder."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""


class ImageConfig(FamilyConfig, Protocol):
    """Of a model with a tower."""

    @property
    def vision(self) -> TowerConfig:
        """The tower."""

    def expected_image(self, data: DataConfig) -> ImageShape:
        """The largest image that ``data`` lets through."""

    def image_cost(self, image: ImageShape) -> ImageCost:
        """What one image costs. A family whose images have numbers beside their pixels takes these as well, and without them
        the most that such an image may cost."""


def image_work(config: ImageConfig, image: ImageShape, grid: tuple[int, ...] = ()) -> tuple[int, float]:
    """Features of an image, and operations of tower and connector on it; ``grid``: its numbers in ``Row.grids``."""
    cost = config.image_cost(image, *([grid] if grid else []))
    return cost.features, tower_flops(config.vision, [cost]) + cost.connector


def has_tower(config: FamilyConfig) -> TypeGuard[ImageConfig]:
    """Whether the model sees images."""
    return hasattr(config, "vision")
