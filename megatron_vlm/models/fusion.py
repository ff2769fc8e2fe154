"""Puts image features into their token positions. Any mismatch of counts is an error that shows both."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vlm.errors import DataError


def fuse(embeddings: Tensor, features: Tensor, positions: Tensor, num_images: int) -> Tensor:
    """Overwrites rows of ``embeddings`` with image features, in order.

    Args:
        embeddings: [T, 1, H].
        features: [F, H], features of all images of the row.
        positions: int64 [F], where they go.
        num_images: images of the row, for the error.

    Returns:
        [T, 1, H].

    Raises:
        DataError: as many features as positions are needed.
    """
    if features.shape[0] != positions.shape[0]:
        raise DataError(
            f"a row of {num_images} images gives {features.shape[0]} image features for {positions.shape[0]} image tokens: "
            "the processor and the model disagree on the tokens of an image"
        )
    return embeddings.index_copy(0, positions, features[:, None].to(embeddings.dtype))


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, *(torch.zeros_like(p) if p.requires_grad else None for p in ctx.saved_tensors)


def touch(x: Tensor, modules: Sequence[nn.Module]) -> Tensor:
    """Returns ``x`` tied to every trainable parameter of ``modules`` with a gradient of zero.

    A row without images would leave the tower without gradients on this rank alone; overlapped gradient reduction then waits
    for a bucket that never comes.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return _Touch.apply(x, *parameters) if parameters else x
