"""What an image costs a model, from its size alone: for estimates of memory and operations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ImageCost:
    """One image.

    Attributes:
        patches: patches that the tower embeds.
        segments: tokens of each stretch that the tower attends within; with their class token, where it has one.
        features: tokens of the row that hold its features.
        connector: operations of the connector's matrix products, two per multiply-add.
        windows: tokens of each window, where some of the tower's layers attend within windows alone.
    """

    patches: int
    segments: tuple[int, ...]
    features: int
    connector: float
    windows: tuple[int, ...] = ()


def projector_flops(features: int, width: int, hidden: int) -> float:
    """Operations of ``layers.projector.Projector``: ``width`` -> ``hidden`` -> ``hidden`` per feature."""
    return 2.0 * features * hidden * (width + hidden)


def tower_flops(vision: Any, costs: Sequence[ImageCost]) -> float:
    """Operations of a tower on images: patch embedding, and the layers that run.

    A layer is attention over all of a segment, or within windows, and a plain or gated MLP.
    """
    segments = [tokens for cost in costs for tokens in cost.segments]
    within = sum(tokens**2 for cost in costs for tokens in cost.windows)
    pairs = mean_pairs(vision, sum(n * n for n in segments), within)
    return tower_operations(vision, sum(cost.patches for cost in costs), sum(segments), pairs)


def mean_pairs(vision: Any, whole: Any, within: Any) -> Any:
    """Pairs of tokens that attend in a layer, on average over layers of whole segments and of windows."""
    share = vision.num_window_layers / vision.num_layers
    return whole + share * (within - whole) if share else whole


def tower_operations(vision: Any, patches: Any, tokens: Any, pairs: Any) -> Any:
    """As ``tower_flops``, of patches, tokens of all segments, and pairs of tokens that attend: numbers, or an array of each."""
    h, layers = vision.hidden_size, getattr(vision, "num_run_layers", vision.num_layers)
    embedding = 2 * patches * vision.patch_numbers * h
    linears = tokens * (8 * h**2 + (6 if vision.gated_mlp else 4) * h * vision.ffn_hidden_size)
    return embedding + layers * (linears + 4 * pairs * h)
