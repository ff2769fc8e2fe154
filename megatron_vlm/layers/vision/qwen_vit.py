"""Qwen's towers over packed patches of images of any size, 2D RoPE in all layers.

    pixels [C, h, w] each --patches in the order of the windows--> linear --encoder--> back in blocks --> [P, Hv]
    patches of a block of m x m --PatchMerger: norm, end to end, linear, GELU, linear--> one feature

Qwen2.5-VL: windows in most layers, whole images in some. Qwen3-VL: whole images in all; learned positions, interpolated;
DeepStack: what comes out of some layers, the levels, is merged as well, [P, (1 + n) Hv] to features of (1 + n) H.

Legend: P patches of all images of the row, Hv hidden size of the tower, m side of a block, n levels. A patch spans two frames of
a video: two of them are an image here, and an image is twice the same frame. Images are segments of one row, windows segments of
their own: no padding, no attention across. Source of the semantics: transformers 5.23, models/qwen2_5_vl/modeling_qwen2_5_vl.py
and models/qwen3_vl/modeling_qwen3_vl.py; arXiv 2502.13923, 2406.04334 (DeepStack).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_vlm.errors import DataError
from megatron_vlm.layers.attention import to_device
from megatron_vlm.layers.backend import backend_of
from megatron_vlm.layers.core_attention import RowParams
from megatron_vlm.layers.mlp import ParallelMLP
from megatron_vlm.layers.vision.encoder import Encoder
from megatron_vlm.layers.vision.siglip import cumulative, patchify


@dataclass
class WindowedRow(RowParams):
    """A row of images, which also holds the same row cut into windows."""

    windows: RowParams | None = None


class WindowLayer(TransformerLayer):
    """megatron-core's layer, which attends within windows."""

    def forward(self, *args: Any, packed_seq_params: Any, **kwargs: Any) -> Any:
        return super().forward(*args, packed_seq_params=packed_seq_params.windows, **kwargs)


class QwenVisionModel(nn.Module):
    """Patch embedding and a bidirectional encoder without final norm.

    Args:
        encoder: megatron-core TransformerBlock ([P, 1, Hv] with ``packed_seq_params``), some layers of it ``WindowLayer``.
        hidden_size, patch_size, temporal_patch_size, num_channels: of the tower.
        block: side of the connector's blocks of patches.
        window: side of a window, in blocks; None: there are none.
        rotary_base: of RoPE.
        bias: of the patch embedding.
        side: positions along one side of a square table, which is interpolated to the grid of an image; 0: none.
        levels: layers whose output is given behind that of the last, in order.
        dtype, device: of the parameters.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        hidden_size: int,
        patch_size: int,
        temporal_patch_size: int,
        num_channels: int,
        block: int,
        window: int | None,
        rotary_base: float,
        bias: bool = False,
        side: int = 0,
        levels: Sequence[int] = (),
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        kernel = (temporal_patch_size, patch_size, patch_size)
        self.patch_embedding = nn.Conv3d(
            num_channels, hidden_size, kernel, stride=kernel, bias=bias, dtype=dtype, device=device
        )
        if side:
            self.position_embedding = nn.Embedding(side * side, hidden_size, dtype=dtype, device=device)
        self.side, self.levels = side, tuple(levels)
        self.patch_size, self.smallest, self.window, self.rotary_base = patch_size, block, window, rotary_base
        self.encoder = encoder

    def forward(self, pixels: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Encodes the images of a row.

        Args:
            pixels: one [C, h, w] per image, of the frames of a video [2 C, h, w] per pair, normalised, of whole blocks; sizes
                differ freely.

        Returns:
            (patch states [P, (1 + n) Hv] block by block, patches of each image).

        Raises:
            DataError: an image that is not of whole blocks.
        """
        size, block = self.patch_size, self.smallest
        unit = size * block
        for image in pixels:
            if image.shape[1] % unit or image.shape[2] % unit or not image.shape[1:].numel():
                raise DataError(
                    f"an image of {image.shape[2]}x{image.shape[1]} pixels is not of whole blocks of {unit}x{unit}"
                )
        weight = self.patch_embedding.weight
        orders = [order(p.shape[1] // unit, p.shape[2] // unit, block, self.window) for p in pixels]
        index = to_device(_end_to_end([ordered.patches for ordered in orders]), weight.device)
        channels, moments = weight.shape[1:3]
        frames = [  # of each patch; where all are images they are the same
            torch.cat([patchify(image[-channels:] if moment else image[:channels], size) for image in pixels])[index]
            for moment in range(moments if any(len(image) > channels for image in pixels) else 1)
        ]
        x = torch.stack([frame.to(weight.dtype).unflatten(1, (channels, -1)) for frame in frames], 2)
        x = F.linear(x.expand(-1, -1, moments, -1).flatten(1), weight.flatten(1), self.patch_embedding.bias)
        if self.side:
            x = x + self._learned([ordered.learned(self.side) for ordered in orders]).to(x.dtype)
        angles = None if self._rotates else self._angles(orders, x.device)
        row, x, states = self._row(orders, x.device), x[:, None], []
        for encoder in self.encoder.parts(self.levels) if self.levels else [self.encoder]:
            x = encoder(x, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=row)
            states.append(x)
        x = torch.cat([x, *states[:-1]], -1) if self.levels else x
        blocks = x[:, 0].unflatten(0, (-1, block * block))
        back = to_device(_end_to_end([ordered.back for ordered in orders]), x.device)
        return blocks[back].flatten(0, 1), [len(ordered.patches) for ordered in orders]

    def _learned(self, corners: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """fp32 [P, Hv]: the table between the corners around each patch."""
        table = self.position_embedding.weight.float()
        index, weights = (to_device(torch.cat(part), table.device) for part in zip(*corners))
        return F.embedding_bag(index, table, per_sample_weights=weights, mode="sum")

    @property
    def _rotates(self) -> bool:
        return backend_of(self.encoder.config).rotates

    def _angles(self, orders: Sequence["Order"], device: torch.device) -> Tensor:
        """fp32 [P, 1, 1, D]: row and column of each patch turn a quarter of the dimensions each, and the halves are alike."""
        quarter = torch.arange(0, self.encoder.config.kv_channels // 2, 2, dtype=torch.float32, device=device)
        inverse = 1.0 / self.rotary_base ** (quarter / (2 * len(quarter)))
        positions = to_device(torch.cat([ordered.positions for ordered in orders]), device)
        half = (positions.float()[:, :, None] * inverse).flatten(1)
        return torch.cat((half, half), -1)[:, None, None]

    def _row(self, orders: Sequence["Order"], device: torch.device) -> WindowedRow:
        counts = [len(ordered.patches) for ordered in orders]
        windows = [length for ordered in orders for length in ordered.windows]
        row = WindowedRow.of(cumulative(counts, device), max(counts), sum(counts))
        row.windows = RowParams.of(cumulative(windows, device), max(windows), sum(windows))
        if self._rotates:
            half = self._angles(orders, device)[:, 0, :, : self.encoder.config.kv_channels // 2]
            row.rotation = row.windows.rotation = (half.cos(), half.sin())
        return row


@dataclass(frozen=True, eq=False)
class Order:
    """How the patches of an image are laid out for windows.

    Attributes:
        patches: int64 [P], of row-major patches, window by window, in a window block by block.
        positions: int64 [P, 2], row and column of each.
        size: rows and columns of the image, in patches.
        windows: patches of each window.
        back: int64 [P / m^2], from blocks in that order to row-major blocks.
    """

    patches: Tensor
    positions: Tensor
    size: tuple[int, int]
    windows: tuple[int, ...]
    back: Tensor

    def learned(self, side: int) -> tuple[Tensor, Tensor]:
        """Corners around each patch in a table of side x side, and their weights: int64 and fp32 [P, 4].

        The outer patches lie on the outer positions. In fp32 as transformers has it, whose operations are repeated.
        """
        corners, weights = [], []
        for index, count in zip(self.positions.T, self.size):
            place = index.float() * (side - 1) / max(count - 1, 1)
            low, next_to = place.floor()[:, None], torch.arange(2)
            corners.append((low.long() + next_to).clamp(max=side - 1))
            weights.append(1 - (place[:, None] - low - next_to).abs())
        index = corners[0][:, :, None] * side + corners[1][:, None]
        return index.flatten(1), (weights[0][:, :, None] * weights[1][:, None]).flatten(1)


def _end_to_end(indices: Sequence[Tensor]) -> Tensor:
    """Permutations of parts -> one of the parts laid end to end."""
    starts = accumulate((len(index) for index in indices), initial=0)
    return torch.cat([index + start for index, start in zip(indices, starts)])


@functools.lru_cache(maxsize=256)
def order(rows: int, columns: int, block: int, window: int | None) -> Order:
    """Of an image of rows x columns blocks; windows at its right and lower edge are smaller."""
    number = torch.arange(rows * columns).view(rows, columns)
    window = window or max(rows, columns)
    cut = [part for band in number.split(window, 0) for part in band.split(window, 1)]
    blocks = torch.cat([part.flatten() for part in cut])
    inner = torch.arange(block)
    row = (blocks // columns * block)[:, None, None] + inner[:, None]
    column = (blocks % columns * block)[:, None, None] + inner
    row, column = (x.expand(-1, block, block).flatten() for x in (row, column))
    return Order(
        patches=row * columns * block + column,
        positions=torch.stack([row, column], 1),
        size=(rows * block, columns * block),
        windows=tuple(part.numel() * block**2 for part in cut),
        back=torch.argsort(blocks),
    )


class PatchMerger(nn.Module):
    """A norm of each patch; the patches of a block end to end through Linear, GELU (exact), Linear.

    Args:
        config: of megatron-core: ``hidden_size`` of the output, ``add_bias_linear`` true, ``activation_func`` ``F.gelu``.
        hidden_size: of a patch.
        block: patches of a block.
        tp_group: ranks that the middle is split over.
        norm: its kind, and its epsilon.
        joined: it is a norm of the block, not of each patch.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        block: int,
        tp_group: Any,
        norm: tuple[str, float],
        joined: bool = False,
    ):
        super().__init__()
        self.width, (kind, epsilon) = hidden_size * block, norm
        self.normed = self.width if joined else hidden_size
        self.norm = backend_of(config).norms[kind](config, self.normed, epsilon)
        self.mlp = ParallelMLP(config, self.width, self.width, tp_group)

    def forward(self, patches: Tensor, counts: Sequence[int]) -> Tensor:
        """patches [P, Hv], block by block -> features [F, H], whole on every rank."""
        return self.mlp(self.norm(patches.reshape(-1, self.normed)).view(-1, self.width))


class DeepStackMerger(PatchMerger):
    """A merger, and one more for each of ``levels`` levels, which norms blocks; arguments as of ``PatchMerger``."""

    def __init__(self, levels: int, *args: Any):
        super().__init__(*args)
        merger = functools.partial(PatchMerger, joined=True)
        self.levels = nn.ModuleList(merger(*args) for _ in range(levels))

    def forward(self, patches: Tensor, counts: Sequence[int]) -> Tensor:
        """patches [P, (1 + n) Hv], block by block -> features [F, (1 + n) H], whole on every rank."""
        last, *levels = patches.chunk(1 + len(self.levels), -1)
        merged = [merge(part, counts) for merge, part in zip(self.levels, levels)]
        return torch.cat([super().forward(last, counts), *merged], -1)
