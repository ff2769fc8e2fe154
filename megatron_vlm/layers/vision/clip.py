"""CLIP's vision transformer, or SigLIP's, over square images of one size, several of them as segments of one row.

    pixels [C, S, S] each --patchify, linear--> [n * n, Hv] --CLS in front, + position table--> pre_layernorm --encoder-->
    states of the selected layer, CLS dropped: [I * n * n, Hv]

Legend: I images of the row, S image size, n = S // patch size, Hv hidden size of the tower. No norm after the encoder: the users
of this tower read one of its hidden states. SigLIP's has no class token and no norm before the encoder. Source of the semantics:
transformers 5.23, models/clip/modeling_clip.py and models/siglip/modeling_siglip.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_vlm.errors import DataError
from megatron_vlm.layers.backend import backend_of
from megatron_vlm.layers.core_attention import RowParams
from megatron_vlm.layers.vision.siglip import cumulative, patchify


class ClipVisionModel(nn.Module):
    """Patch and class embedding, learned positions and a bidirectional encoder up to the selected layer.

    What the selected layer does not need (the layers after it, the final norm) is kept beside, frozen and never run: the exported
    checkpoint is whole, and no gradient reduction waits for it.

    Args:
        encoder: megatron-core TransformerBlock of all layers ([T, 1, Hv] with ``packed_seq_params``), without a final norm.
        num_run_layers: layers that run; the others are kept.
        config: of the encoder, for the norms.
        patch_size, num_channels: of the tower.
        side: patches along one side of an image, which the position table is made for.
        siglip: SigLIP's: no class token, biases of the patch embedding, no norm before the encoder.

    Attributes:
        smallest: patches along one side of the image that rows without images run on (models/fusion.py).
    """

    smallest = 1

    def __init__(
        self,
        encoder: Any,
        *,
        num_run_layers: int,
        config: TransformerConfig,
        patch_size: int,
        num_channels: int,
        side: int,
        siglip: bool = False,
    ):
        super().__init__()
        hidden, epsilon = config.hidden_size, config.layernorm_epsilon
        like = next(encoder.parameters())
        options: dict[str, Any] = dict(dtype=like.dtype, device=like.device)
        self.patch_size, self.side = patch_size, side
        self.class_embedding = None if siglip else nn.Parameter(torch.zeros(hidden, **options))
        self.patch_embedding = nn.Conv2d(num_channels, hidden, patch_size, stride=patch_size, bias=siglip, **options)
        self.position_embedding = nn.Embedding(side * side + (not siglip), hidden, **options)
        norm = backend_of(config).norm(config)
        self.pre_layernorm = nn.Identity() if siglip else norm(config, hidden, epsilon)
        self.unused_layers = nn.ModuleList(encoder.layers[num_run_layers:])
        self.unused_layernorm = norm(config, hidden, epsilon)
        encoder.layers = nn.ModuleList(encoder.layers[:num_run_layers])
        encoder.num_layers_per_pipeline_rank = num_run_layers  # recomputation counts by it
        self.encoder = encoder
        self.unused_layers.requires_grad_(False)
        self.unused_layernorm.requires_grad_(False)

    def forward(self, pixels: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Encodes the images of a row.

        Args:
            pixels: one [C, S, S] per image, normalised, of which what lies beyond whole patches is dropped, as by a convolution;
                or one image of ``smallest`` patches a side, alone in its row.

        Returns:
            (patch states [P, Hv], patches of each image, all equal).

        Raises:
            DataError: an image of another size than the position table's.
        """
        side = self.side_of(pixels)
        size = side * self.patch_size
        for image in pixels:
            if (image.shape[1] // self.patch_size, image.shape[2] // self.patch_size) != (side, side):
                raise DataError(
                    f"the tower has positions for {size}x{size} pixels, got an image of "
                    f"{image.shape[2]}x{image.shape[1]}: the processor's image size and the model's differ"
                )
        weight = self.patch_embedding.weight
        patches = torch.stack([patchify(image, self.patch_size) for image in pixels]).to(weight.dtype)
        x = F.linear(patches, weight.flatten(1), self.patch_embedding.bias)
        first = int(self.class_embedding is not None)
        count = first + side * side
        positions = self.position_embedding.weight[:count]  # of all, too: autograd's order must not depend on the row
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = x + positions
        row = RowParams.of(cumulative([count] * len(x), x.device), count, len(x) * count)
        x = self.pre_layernorm(x).reshape(-1, 1, x.shape[-1])
        x = self.encoder(x, attention_mask=None, packed_seq_params=row)
        states = x.view(len(pixels), count, -1)[:, first:].reshape(len(pixels) * (count - first), -1)
        return states, [count - first] * len(pixels)

    def side_of(self, pixels: Sequence[Tensor]) -> int:
        """Patches along one side of the images of a row: the table's, or ``smallest`` where an image of that size leads."""
        size = self.smallest * self.patch_size
        return self.smallest if tuple(pixels[0].shape[1:]) == (size, size) else self.side


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)
