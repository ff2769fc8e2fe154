"""Images of any whole number of tiles over a tower of one size, laid out as lines of text (InternLM-XComposer2-4KHD).

    pixels [C, rows * S, columns * S] --global view and tiles--> CLIP --2 x 2 joined, a newline after each line--> [F, 4 Hv]

Legend: S size of the tower's images, n patches a side, Hv hidden size of the tower, F features of all images of the row.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vlm.errors import DataError
from megatron_vlm.layers.context.images import ImageParts
from megatron_vlm.layers.projector import Projector
from megatron_vlm.layers.vision.clip import ClipVisionModel


class HdClipVisionModel(ClipVisionModel):
    """The tower over images of any whole number of tiles: a global view of each, then its tiles row by row."""

    smallest = 2  # the connector joins 2 x 2 patches

    def forward(self, pixels: Sequence[Tensor]) -> tuple[Tensor, list[Any]]:
        """Encodes the images of a row.

        Args:
            pixels: one [C, rows * S, columns * S] per image, normalised.

        Returns:
            (patch states [tiles * n * n, Hv], (rows, columns) of each image).

        Raises:
            DataError: an image that is not whole tiles.
        """
        size = self.side_of(pixels) * self.patch_size
        views = [view for image in pixels for view in cut_views(image, size)]
        return super().forward(views)[0], [(image.shape[1] // size, image.shape[2] // size) for image in pixels]

    def encode_parts(self, pixels: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Encodes views [C, S, S] of any images: as of a tower of squares."""
        return super().forward(pixels)

    def parts(self, image: tuple[int, ...], features: int, work: float) -> ImageParts:
        """Views are dealt one by one, each with a newline and a separator of its own: of an image of ``work``."""
        size, half = self.side * self.patch_size, self.side // 2
        rows, columns = image[1] // size, image[2] // size
        width = half * half + 2
        raster = (torch.arange(1 + rows * columns) * width)[:, None, None] + torch.arange(half * half).view(half, half)
        ends = raster[:, :, -1:] + width - 2 - torch.arange(half)[:, None] * half - (half - 1)  # each view's newline
        whole = raster[1:].view(rows, columns, half, half).transpose(1, 2).reshape(rows * half, columns * half)
        last = ends[1:].view(rows, columns, half, 1)[:, -1].reshape(rows * half, 1)
        view, separator = torch.cat([raster[0], ends[0]], 1).flatten(), torch.tensor([width - 1])
        tokens = torch.cat([view, separator, torch.cat([whole, last], 1).flatten()])
        number = 1 + rows * columns
        return ImageParts(
            number=number, cut=lambda pixels: cut_views(pixels, size), features=width, work=work / number, tokens=tokens
        )


def cut_views(image: Tensor, size: int) -> list[Tensor]:
    """[C, rows * S, columns * S] -> its global view and its tiles row by row, [C, S, S] each.

    Raises:
        DataError: it is not whole tiles.
    """
    channels, height, width = image.shape
    rows, columns = height // size, width // size
    if (rows * size, columns * size) != (height, width) or not rows * columns:
        raise DataError(f"an image of {width}x{height} pixels is not whole tiles of {size}x{size}")
    view = F.interpolate(image[None].float(), size=(size, size), mode="bicubic", align_corners=False)
    cut = image.view(channels, rows, size, columns, size).permute(1, 3, 0, 2, 4)
    return [view[0].to(image.dtype), *cut.reshape(rows * columns, channels, size, size)]


class HdConnector(nn.Module):
    """Projection, of the views of an image laid out as lines of text where images are several.

    Args:
        projection: of features [F, in] to [F, H].
        hd_width: width of the joined features, of ``newline`` and ``separator``; None: images are single squares.
    """

    def __init__(self, projection: Projector, hd_width: int | None = None):
        super().__init__()
        self.projection = projection
        if hd_width is not None:
            like = projection.mlp.linear_fc1.weight
            self.newline = nn.Parameter(like.new_empty(1, 1, 1, hd_width))
            self.separator = nn.Parameter(like.new_empty(1, 1, hd_width))

    def forward(self, patches: Tensor, grids: Sequence[Any]) -> Tensor:
        """Patch states -> features [F, H]; ``grids``: what the tower returned beside them."""
        if hasattr(self, "newline"):
            patches = lay_out(patches, grids, self.newline[0, 0], self.separator[0])
        return self.projection(patches)

    def of_parts(self, patches: Tensor, counts: Sequence[int]) -> Tensor:
        """Patch states of views -> features [views * (n * n / 4 + 2), H], of each view those of its patches, of newline and of
        separator; of squares as ``forward``."""
        if not hasattr(self, "newline"):
            return self.forward(patches, counts)
        joined = _join(patches, len(counts)).flatten(1, 2)
        ends = torch.cat([self.newline[0], self.separator], 1)
        return self.projection(torch.cat([joined, ends.expand(len(joined), -1, -1)], 1).flatten(0, 1))


def lay_out(patches: Tensor, grids: Sequence[tuple[int, int]], newline: Tensor, separator: Tensor) -> Tensor:
    """Orders the views of images as the decoder reads them: lines of the global view, a separator, lines of the whole.

    Args:
        patches: [views * n * n, Hv], of each image first the global view, then its tiles row by row.
        grids: (rows, columns) of tiles of each image.
        newline: [1, 4 Hv], ends each line.
        separator: [1, 4 Hv].

    Returns:
        [F, 4 Hv]; 2 x 2 neighbouring patches are one feature, upper left, upper right, lower left, lower right.
    """
    views = [1 + rows * columns for rows, columns in grids]
    joined = _join(patches, sum(views))
    half, width = joined.shape[2:]
    parts = []
    for (rows, columns), tiles in zip(grids, joined.split(views)):
        whole = (
            tiles[1:].view(rows, columns, half, half, width).transpose(1, 2).reshape(rows * half, columns * half, width)
        )
        parts += [_lines(tiles[0], newline), separator, _lines(whole, newline)]
    return torch.cat(parts)


def _join(patches: Tensor, views: int) -> Tensor:
    """[views * n * n, Hv] -> [views, n / 2, n / 2, 4 Hv], blocks of 2 x 2 patches."""
    half = int((len(patches) // views) ** 0.5) // 2
    blocks = patches.view(views, half, 2, half, 2, patches.shape[1]).transpose(2, 3)
    return blocks.reshape(views, half, half, 4 * patches.shape[1])


def _lines(raster: Tensor, newline: Tensor) -> Tensor:
    """[rows, columns, W] -> [rows * (columns + 1), W], a newline after each row."""
    return torch.cat([raster, newline.expand(len(raster), 1, -1)], 1).flatten(0, 1)
