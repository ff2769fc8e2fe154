"""Builds InternLM-XComposer2's stages: CLIP tower, projection, InternLM2 decoder with partial LoRA.

    7b, vl-7b   pixels [3, S, S] --CLIP, all layers--> [n * n, Hv] --projection--> [n * n, H]
    4khd-7b     pixels [3, rows * S, columns * S] --global view and tiles--> CLIP --2 x 2 joined, newlines--> [F, 4 Hv]
                --projection--> [F, H]

Legend: S size of the tower's images (336), n patches a side, Hv and H hidden sizes of tower and decoder.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vlm.errors import DataError
from megatron_vlm.layers.norm import RMSNorm
from megatron_vlm.layers.partial_lora import PartialLoraColumnLinear, PartialLoraLayer, PartialLoraRowLinear
from megatron_vlm.layers.projector import Projector
from megatron_vlm.layers.vision.clip import ClipVisionModel
from megatron_vlm.models.clip import build_clip
from megatron_vlm.models.language import Decoder, layer_spec, transformer_config
from megatron_vlm.models.vlm import VisionLanguageModel, stage_ends
from megatron_vlm.models.xcomposer2.config import XComposer2Config
from megatron_vlm.parallel.topology import Topology


class HdClipVisionModel(ClipVisionModel):
    """The tower over images of any whole number of tiles: a global view of each, then its tiles row by row."""

    def forward(self, pixels: Sequence[Tensor]) -> tuple[Tensor, list[Any]]:
        """Encodes the images of a row.

        Args:
            pixels: one [C, rows * S, columns * S] per image, normalised.

        Returns:
            (patch states [tiles * n * n, Hv], (rows, columns) of each image).

        Raises:
            DataError: an image that is not whole tiles.
        """
        size = self.side * self.patch_size
        tiles, grids = [], []
        for image in pixels:
            channels, height, width = image.shape
            rows, columns = height // size, width // size
            if (rows * size, columns * size) != (height, width) or not rows * columns:
                raise DataError(f"an image of {width}x{height} pixels is not whole tiles of {size}x{size}")
            view = F.interpolate(image[None].float(), size=(size, size), mode="bicubic", align_corners=False)
            cut = image.view(channels, rows, size, columns, size).permute(1, 3, 0, 2, 4)
            tiles += [view[0].to(image.dtype), *cut.reshape(rows * columns, channels, size, size)]
            grids.append((rows, columns))
        return super().forward(tiles)[0], grids


class XComposer2Connector(nn.Module):
    """Projection; in the 4khd variant of the views of an image laid out as lines of text.

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
    count = len(patches) // sum(views)
    half = int(count**0.5) // 2
    width = 4 * patches.shape[1]
    joined = patches.view(-1, half, 2, half, 2, patches.shape[1]).transpose(2, 3).reshape(-1, half, half, width)
    parts = []
    for (rows, columns), tiles in zip(grids, joined.split(views)):
        whole = (
            tiles[1:].view(rows, columns, half, half, width).transpose(1, 2).reshape(rows * half, columns * half, width)
        )
        parts += [_lines(tiles[0], newline), separator, _lines(whole, newline)]
    return torch.cat(parts)


def _lines(raster: Tensor, newline: Tensor) -> Tensor:
    """[rows, columns, W] -> [rows * (columns + 1), W], a newline after each row."""
    return torch.cat([raster, newline.expand(len(raster), 1, -1)], 1).flatten(0, 1)


def build_xcomposer2(
    config: XComposer2Config, topology: Topology, options: Any, *, vp_stage: int | None = None
) -> VisionLanguageModel:
    """Builds one stage; only the first owns tower and connector."""
    pre, post = stage_ends(topology, vp_stage)
    layer = layer_spec(
        RMSNorm,
        causal=True,
        layer=PartialLoraLayer,
        params=dict(rank=config.plora_rank, dropout=config.plora_dropout),
        column=PartialLoraColumnLinear,
        row=PartialLoraRowLinear,
    )
    decoder = Decoder(config.text, topology, options, vp_stage, pre, post, layer=layer)
    tower = HdClipVisionModel if config.hd else ClipVisionModel
    return VisionLanguageModel(
        decoder,
        build_clip(config.vision, topology, options, tower) if pre else None,
        _build_connector(config, topology, options) if pre else None,
        recompute_connector=options.recompute_granularity is not None,
    )


def _build_connector(config: XComposer2Config, topology: Topology, options: Any) -> XComposer2Connector:
    mcore = transformer_config(
        topology,
        options,
        decoder=False,
        num_layers=1,
        hidden_size=config.text.hidden_size,
        num_attention_heads=config.text.num_attention_heads,
        activation_func=F.gelu,
        add_bias_linear=True,
    )
    projection = Projector(mcore, config.feature_size, topology.tp_group)
    return XComposer2Connector(projection, config.feature_size if config.hd else None)
