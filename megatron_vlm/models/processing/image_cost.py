"""What an image costs a model, from its size alone: for estimates of memory and operations."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ImageCost:
    """One image.

    Attributes:
        patches: patches that the tower embeds.
        segments: tokens of each stretch that the tower attends within; with their class token, where it has one.
        features: tokens of the row that hold its features.
        connector: operations of the connector's matrix products, two per multiply-add.
    """

    patches: int
    segments: tuple[int, ...]
    features: int
    connector: float


def projector_flops(features: int, width: int, hidden: int) -> float:
    """Operations of ``layers.projector.Projector``: ``width`` -> ``hidden`` -> ``hidden`` per feature."""
    return 2.0 * features * hidden * (width + hidden)
