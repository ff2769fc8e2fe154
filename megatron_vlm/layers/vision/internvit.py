"""InternViT over packed tiles, as InternVL uses it.

    pixels [C, n * s, s] each --n tiles of s x s--> [tiles, 1 + N, Hv] (CLS, patches) + positions --encoder--> patches [P, Hv]

Per layer: x += drop_path(scale1 * attention(norm(x))); x += drop_path(scale2 * mlp(norm(x))). No final norm, CLS is dropped.

Legend: s side of a tile in pixels, N patches of a tile, P patches of all tiles of the row, Hv hidden size of the tower. Tiles
are segments of one row: no attention across them. Source of the semantics: transformers 5.23, models/internvl/
modeling_internvl.py; architecture: arXiv 2312.14238.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_vlm.errors import DataError
from megatron_vlm.layers.context.images import ImageParts
from megatron_vlm.layers.core_attention import RowParams
from megatron_vlm.layers.norm import make_parameter
from megatron_vlm.layers.vision.siglip import cumulative, patchify


class InternVisionModel(nn.Module):
    """Patch embedding, CLS token, learned positions and a bidirectional encoder.

    Args:
        encoder: megatron-core TransformerBlock ([tokens, 1, Hv] with ``packed_seq_params``), without final norm.
        hidden_size, patch_size, num_channels: of the tower.
        side: patches along one side of the tile that the positions were learned on.
        smallest: patches along one side of the tile that rows without images run on (models/fusion.py).
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
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        options: Any = dict(dtype=dtype, device=device)
        self.patch_size, self.side, self.smallest = patch_size, side, smallest
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, hidden_size, **options))
        self.patch_embedding = nn.Conv2d(num_channels, hidden_size, patch_size, stride=patch_size, **options)
        self.position_embedding = nn.Parameter(torch.zeros(1, side * side + 1, hidden_size, **options))
        self.encoder = encoder

    def forward(self, pixels: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Encodes the images of a row.

        Args:
            pixels: one [C, n * s, s] per image: its n square tiles, one below the other.

        Returns:
            (patch states [P, Hv] tile by tile, patches of each tile).

        Raises:
            DataError: tiles that are not square, not of whole patches, or of different sizes.
        """
        tile = pixels[0].shape[2]
        for image in pixels:
            if image.shape[2] != tile or image.shape[1] % tile or tile % self.patch_size:
                raise DataError(
                    f"an image of {image.shape[2]}x{image.shape[1]} pixels is not a column of square tiles of {tile} "
                    f"pixels, which are patches of {self.patch_size}"
                )
        weight, side = self.patch_embedding.weight, tile // self.patch_size
        # Rows of patches run on from tile to tile, so that a column of tiles is cut as one image.
        patches = torch.cat([patchify(image, self.patch_size) for image in pixels]).to(weight.dtype)
        x = F.linear(patches, weight.flatten(1), self.patch_embedding.bias).unflatten(0, (-1, side * side))
        x = torch.cat([self.class_embedding.expand(len(x), -1, -1), x], 1) + self.positions(side)
        tiles, tokens = x.shape[:2]
        row = RowParams.of(cumulative([tokens] * tiles, x.device), tokens, tiles * tokens)
        x = self.encoder(x.flatten(0, 1)[:, None], attention_mask=None, packed_seq_params=row)
        return x[:, 0].unflatten(0, (tiles, tokens))[:, 1:].flatten(0, 1), [side * side] * tiles

    def parts(self, image: tuple[int, ...], features: int, work: float) -> ImageParts:
        """Tiles are dealt one by one: of an image of ``features`` and ``work``."""
        tiles = image[1] // image[2]
        return ImageParts(
            number=tiles, cut=lambda pixels: pixels.chunk(tiles, 1), features=features // tiles, work=work / tiles
        )

    def positions(self, side: int) -> Tensor:
        """Position table [1, 1 + side * side, Hv]; bicubic interpolation where ``side`` is not the learned one."""
        if side == self.side:
            return self.position_embedding
        table = self.position_embedding[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        resized = F.interpolate(table.float(), size=(side, side), mode="bicubic", align_corners=False)
        resized = resized.to(table.dtype).permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([self.position_embedding[:, :1], resized], 1)


class ScaledResidual(nn.Module):
    """x + drop_path(scale * update), in the place of megatron-core's bias-dropout-add.

    Drop path (arXiv 1603.09382) leaves out whole tiles' updates at random and scales the others up. Its draws come from the
    default generator: seeded by (run seed, iteration, dp, pp), equal on tensor parallel ranks, restored by recomputation.

    Args:
        config: of megatron-core.
        drop_path: probability that a tile's update is left out in training.
    """

    def __init__(self, config: TransformerConfig, drop_path: float):
        super().__init__()
        self.scale = make_parameter(torch.ones(config.hidden_size, dtype=config.params_dtype), config)
        self.drop_path = drop_path
        self.tile_tokens = 0

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """Returns the function that megatron-core's layer calls with (output, bias), residual and dropout."""
        drop = self.drop_path if training else 0.0

        def add(update_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            update, bias = update_with_bias
            update = self.scale * (update if bias is None else update + bias)
            if drop:
                tiles = len(update) // self.tile_tokens
                keep = torch.rand(tiles, device=update.device) >= drop
                update = (
                    update * (keep.to(update.dtype) / (1 - drop)).repeat_interleave(self.tile_tokens)[:, None, None]
                )
            return residual + update

        return add


class InternVitLayer(TransformerLayer):
    """megatron-core's layer with scaled residuals, which learn from the row how many tokens a tile has."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.self_attn_bda.tile_tokens = self.mlp_bda.tile_tokens = kwargs["packed_seq_params"].max_seqlen_q
        return super().forward(*args, **kwargs)


class WidthRMSNorm(nn.Module):
    """RMSNorm of queries or keys over all heads together: the mean of squares runs over every tensor parallel rank's heads.

    Args:
        config: of megatron-core.
        hidden_size: of one head, as megatron-core's attention gives it; the width is ``config.hidden_size``.
        tp_group: ranks that the heads are split over.
        eps: of the norm.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, tp_group: Any, eps: float = 1e-6):
        super().__init__()
        self.eps, self.width, self.tp_group = eps, config.hidden_size, tp_group
        size = config.hidden_size // tp_group.size()
        self.weight = make_parameter(torch.ones(size, dtype=config.params_dtype), config)

    def forward(self, x: Tensor) -> Tensor:
        """[..., heads / tp, D] -> the same."""
        flat = x.flatten(-2).float()
        squares = flat.square().sum(-1, keepdim=True)
        # Summed forwards and backwards: each rank's output depends on every rank's heads.
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.tp_group)
        normed = (flat * torch.rsqrt(squares / self.width + self.eps)).to(x.dtype)
        return (self.weight * normed).view(x.shape)


def pixel_shuffle(patches: Tensor, tiles: int, factor: int) -> Tensor:
    """Folds blocks of ``factor`` x ``factor`` neighbouring patches into one feature each (InternVL's version v2).

    Args:
        patches: [tiles * N, Hv], row-major in each tile.
        tiles: number of tiles.
        factor: side of a block; N is a square of a multiple of it.

    Returns:
        [tiles * N / factor^2, Hv * factor^2], row-major in each tile; within a feature row by row of the block.
    """
    side = int((len(patches) // tiles) ** 0.5)
    grid = patches.view(tiles, side // factor, factor, side // factor, factor, -1)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(len(patches) // factor**2, -1)
