"""SigLIP tower over packed patches of images of any size (NaViT style), as Idefics2 and Idefics3 use it.

    pixels [C, h, w] each --patchify--> [P, C * p * p] --linear--> + position table --encoder--> [P, Hv]

Legend: P patches of all images of the row, p patch size, Hv hidden size of the tower. Images are segments of one row: no
padding, no attention across images. Source of the semantics: transformers 5.23, models/idefics2/modeling_idefics2.py.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vlm.errors import DataError
from megatron_vlm.layers.attention import to_device
from megatron_vlm.layers.core_attention import RowParams


class SiglipVisionModel(nn.Module):
    """Patch embedding, position table and a bidirectional encoder with a final norm.

    Args:
        encoder: megatron-core TransformerBlock ([P, 1, Hv] with ``packed_seq_params``), final norm included.
        hidden_size, patch_size, num_channels: of the tower.
        side: positions along one side of the square position table.
        smallest: patches along one side of the image that rows without images run on (models/fusion.py).
        stretched: the table is stretched over images of any size; else an image has the positions of its corner.
        dtype, device: of the parameters.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        hidden_size: int,
        patch_size: int,
        num_channels: int,
        side: int,
        smallest: int = 1,
        stretched: bool = True,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        self.patch_size, self.side, self.smallest, self.stretched = patch_size, side, smallest, stretched
        self.patch_embedding = nn.Conv2d(
            num_channels, hidden_size, patch_size, stride=patch_size, dtype=dtype, device=device
        )
        self.position_embedding = nn.Embedding(side * side, hidden_size, dtype=dtype, device=device)
        self.encoder = encoder

    def forward(self, pixels: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Encodes the images of a row.

        Args:
            pixels: one [C, h, w] per image, normalised; sizes differ freely.

        Returns:
            (patch states [P, Hv], patches of each image).

        Raises:
            DataError: an image smaller than one patch.
        """
        size = self.patch_size
        weight = self.patch_embedding.weight
        grids = [(image.shape[1] // size, image.shape[2] // size) for image in pixels]
        for image, (rows, columns) in zip(pixels, grids):
            if rows * columns == 0:
                raise DataError(f"an image of {image.shape[2]}x{image.shape[1]} pixels holds no patch of {size}x{size}")
        counts = [rows * columns for rows, columns in grids]
        patches = torch.cat([patchify(image, size) for image in pixels]).to(weight.dtype)
        place = position_ids if self.stretched else corner_ids
        positions = torch.cat([place(*grid, self.side) for grid in grids])
        x = F.linear(patches, weight.flatten(1), self.patch_embedding.bias)
        x = x + self.position_embedding(to_device(positions, x.device))
        cu_seqlens = cumulative(counts, x.device)
        row = RowParams.of(cu_seqlens, max(counts), len(x))
        return self.encoder(x[:, None], attention_mask=None, packed_seq_params=row)[:, 0], counts


def corner_ids(rows: int, columns: int, side: int) -> Tensor:
    """Position of each patch of a rows x columns grid laid into the corner of a side x side table: int64 [rows * columns]."""
    return (torch.arange(rows)[:, None] * side + torch.arange(columns)).reshape(-1)


def cumulative(counts: Sequence[int], device: torch.device) -> Tensor:
    """int32 [N + 1]: starts of segments of the given lengths, and the total."""
    return to_device(torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32), device)


def patchify(image: Tensor, size: int) -> Tensor:
    """[C, h, w] -> [rows * columns, C * size * size], row-major, in the order of a flattened convolution kernel.

    What remains right of and below the last whole patch is dropped, as by a convolution without padding.
    """
    channels, rows, columns = image.shape[0], image.shape[1] // size, image.shape[2] // size
    image = image[:, : rows * size, : columns * size]
    blocks = image.reshape(channels, rows, size, columns, size).permute(1, 3, 0, 2, 4)
    return blocks.reshape(rows * columns, channels * size * size)


@functools.lru_cache(maxsize=4096)
def position_ids(rows: int, columns: int, side: int) -> Tensor:
    """Bucketised position of each patch of a rows x columns grid in a side x side table: int64 [rows * columns].

    The float32 operations of transformers 5.23 are repeated as they stand: exact arithmetic gives other buckets for some
    sizes (25, 49, 50 and 55 patches at side 70).
    """
    boundaries = torch.arange(1 / side, 1.0, 1 / side)

    def buckets(count: int) -> Tensor:
        step = 1.0 / torch.tensor([count])
        coordinates = torch.clamp(torch.arange(count, dtype=torch.float32) * step, max=(1.0 - 1e-6))
        return torch.bucketize(coordinates, boundaries, right=True)

    return (buckets(rows)[:, None] * side + buckets(columns)[None]).reshape(-1)
