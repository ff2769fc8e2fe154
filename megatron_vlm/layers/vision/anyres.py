"""Images as the whole and tiles over a tower of one size, laid out as lines of text (LLaVA-NeXT, LLaVA-OneVision).

    pixels [C, views * S, S] --each view--> CLIP or SigLIP --projector--> [views * n * n, H]
        --the whole; tiles joined, cut, perhaps shrunk, a newline after each line--> [F, H]

Legend: S size of the tower's images, n patches a side, H hidden size of the decoder, F features of all images of the row.
What is cut and shrunk: ``data/images/anyres.py``.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vlm.layers.projector import Projector
from megatron_vlm.layers.vision.clip import ClipVisionModel


class AnyResClipVisionModel(ClipVisionModel):
    """The tower over columns of views."""

    def forward(self, pixels: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """One [C, views * S, S] per image -> (patch states [P, Hv], patches of each image).

        Raises:
            DataError: an image that is not whole views.
        """
        views = [image.split(image.shape[2], 1) for image in pixels]
        states, counts = super().forward([view for image in views for view in image])
        return states, [counts[0] * len(image) for image in views]


class AnyResConnector(Projector):
    """The projector, and the layout of what it makes of the views of an image.

    Args:
        anyres: of the model, data.images.anyres.AnyRes.
        args: of Projector.
    """

    def __init__(self, anyres: Any, *args: Any):
        super().__init__(*args)
        self.anyres = anyres
        weight = self.mlp.linear_fc2.weight
        self.newline = nn.Parameter(weight.new_empty(weight.shape[0]))

    def forward(self, patches: Tensor, images: Sequence[Any]) -> Tensor:  # type: ignore[override]
        """Patch states [P, Hv] -> features [F, H].

        Args:
            patches: of all views of all images.
            images: the View of each; or how many patches it has, where no more is known (estimates of memory, and the small image
                that rows without images run on): tiles in one column, all of them kept.
        """
        features, area = super().forward(patches), self.anyres.side**2
        views = [self.anyres.known(x) for x in images]
        counts = [x if isinstance(x, int) else area * (1 + x[0] * x[1]) for x in images]
        own = features.split(counts)
        return torch.cat([part for view, some in zip(views, own) for part in self._laid_out(view, some)])

    def _laid_out(self, view: Any, features: Tensor) -> list[Tensor]:
        side, width = self.anyres.side, features.shape[1]
        if not view.rows:
            return [features, self.newline[None]]
        whole, tiles = features.split([side**2, len(features) - side**2])
        tiles = tiles.view(view.rows, view.columns, side, side, width).transpose(1, 2)
        lines = self.anyres.lines(view)
        kept = tiles.reshape(view.rows * side, view.columns * side, width)
        kept = kept[lines.top : lines.top + lines.height, lines.left : lines.left + lines.width]
        if lines[4:] != lines[2:4]:
            kept = F.interpolate(kept.permute(2, 0, 1)[None], size=lines[4:], mode="bilinear")[0].permute(1, 2, 0)
        return [whole, torch.cat([kept, self.newline.expand(len(kept), 1, -1)], 1).flatten(0, 1)]
