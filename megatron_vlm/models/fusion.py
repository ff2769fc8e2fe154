"""Puts image features into their token positions; those of a row without images go nowhere, and cost no number.

    row with images     pixels --tower, connector--> features --fuse--> rows of the embeddings
    row without         filler_pixels --tower, connector--> features --Filler.beside--> embeddings as they are

Why a row without images runs them at all: overlapped gradient reduction reduces a bucket when the last of its parameters has its
gradient. Every rank must reach the same parameters in the same order, or ranks reduce different buckets with each other.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vlm.errors import DataError


def fuse(
    embeddings: Tensor, features: Tensor, positions: Tensor, num_images: int, part: tuple[Tensor, int] | None = None
) -> Tensor:
    """Overwrites rows of ``embeddings`` with image features, in order.

    Args:
        embeddings: [T, 1, H].
        features: [F, H], features of all images of the row; wider: with the levels of DeepStack (layers/deepstack.py).
        positions: int64 [F], where they go.
        num_images: images of the row, for the error.
        part: ``positions`` and the embeddings are of a slice of the row: see ``Row.part``.

    Returns:
        [T, 1, H], or as wide as the features, zeros behind the embeddings of text.

    Raises:
        DataError: as many features as positions are needed.
    """
    wanted = positions.shape[0] if part is None else part[1]
    if features.shape[0] != wanted:
        raise DataError(
            f"a row of {num_images} images gives {features.shape[0]} image features for {wanted} image tokens: "
            "the processor and the model disagree on the tokens of an image"
        )
    if part is not None:
        features = features.index_select(0, part[0])
    if features.shape[1] > embeddings.shape[2]:
        embeddings = F.pad(embeddings, (0, features.shape[1] - embeddings.shape[2]))
    return embeddings.index_copy(0, positions, features[:, None].to(embeddings.dtype))


def filler_pixels(tower: Any) -> tuple[Tensor, ...]:
    """What a row without images runs ``tower`` on: one image of zeros, [C, n * p, n * p].

    C channels and p pixels are those of ``tower.patch_embedding``; n is ``tower.smallest``, 2 where the connector joins blocks of
    2 x 2 patches, and 1 where the tower has none.
    """
    embedding: nn.Conv2d | nn.Conv3d = tower.patch_embedding
    height, width = (size * getattr(tower, "smallest", 1) for size in embedding.kernel_size[-2:])
    return (torch.zeros(embedding.in_channels, height, width, device=embedding.weight.device),)


class Filler:
    """Features that go nowhere, of one model: autograd passes through what made them, and no number comes of it.

    On the way back they get zeros, but zero times an activation that overflowed is nan. So while the gradient on its way back
    through tower and connector is filler's, what each parameter receives is replaced by zeros.

    Attributes:
        passing: the pass on its way back through tower and connector is filler's.
    """

    def __init__(self) -> None:
        self.passing = False
        self._guarded: set[nn.Parameter] = set()

    def beside(self, x: Tensor, features: Tensor) -> Tensor:
        """Returns ``x`` [T, 1, H] as it is, its gradient going on to ``features`` [F, H] as zeros.

        Args:
            x: embeddings of a row without images.
            features: of filler, made by parameters that are guarded.
        """
        return _Beside.apply(x, features, self)

    def guard(self, parameters: Iterable[nn.Parameter]) -> None:
        """Has each receive zeros while filler's gradient passes: all that have a part in features of filler."""
        for parameter in parameters:
            if parameter.requires_grad and parameter not in self._guarded:
                self._guarded.add(parameter)
                parameter.register_hook(self._zeros)
                setattr(parameter, "guarded_by", self)  # noqa: B010 - read where a product adds to the gradient itself

    def real(self, features: Tensor) -> Tensor:
        """Returns features of images as they are; their gradient is none of filler's."""
        return _Real.apply(features, self)

    def _zeros(self, gradient: Tensor) -> Tensor | None:
        return torch.zeros_like(gradient) if self.passing else None


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, features: Tensor, filler: Filler) -> Tensor:
        ctx.filler = filler
        ctx.like = dict(size=features.shape, dtype=features.dtype, device=features.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.filler.passing = True
        return grad if ctx.needs_input_grad[0] else None, torch.zeros(**ctx.like), None


class _Real(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, filler: Filler) -> Tensor:
        ctx.filler = filler
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.filler.passing = False
        return grad, None
