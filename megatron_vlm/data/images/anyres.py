"""Images at the best of some sizes of whole tiles, beside a view of the whole (LLaVA-NeXT, LLaVA-OneVision).

    image --resized to S x S--> the whole
          --the best size, aspect ratio kept--> centred on black, cut row by row--> tiles
    features of tiles --joined, without rows or columns that see black alone, shrunk where too many--> lines, a newline after each

Legend: S side of the tower's images in pixels, n patches along it. What of an image is seen is a ``View`` of whole numbers, which
travel with the pixels (``Row.grids``). Semantics: transformers 5.23, models/llava_next and models/llava_onevision.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from megatron_vlm.config import Config
from megatron_vlm.data.images.tiling import cut
from megatron_vlm.errors import ConfigError


class View(NamedTuple):
    """How an image is seen: rows and columns of tiles, 0 where the whole is all, and its own height and width in pixels."""

    rows: int
    columns: int
    height: int
    width: int


def column(views: int) -> View:
    """Of an image of which no more is known: its tiles below one another, all of them kept."""
    return View(views - 1, min(1, views - 1), 0, 0)


class Lines(NamedTuple):
    """Features of tiles as lines: which rows and columns are kept, and how many of each are left where they are shrunk."""

    top: int
    left: int
    height: int
    width: int
    rows: int
    columns: int


@dataclass(frozen=True, kw_only=True)
class AnyRes(Config):
    """Settings.

    Attributes:
        sizes: (height, width) in pixels that images may take.
        tile: S.
        side: n.
        most: tiles whose features an image may have, more are shrunk to about as many; None: all are kept.
    """

    sizes: tuple[tuple[int, int], ...]
    tile: int
    side: int
    most: int | None = None

    def __post_init__(self) -> None:
        if not self.sizes or any(edge < 1 or edge % self.tile for size in self.sizes for edge in size):
            raise ConfigError(f"image_grid_pinpoints {[*self.sizes]} must be whole tiles of {self.tile} pixels")

    def view(self, width: int, height: int) -> View:
        """Of an image: the size that keeps most of its pixels, and of such ones that with the least black."""
        best, most, waste = self.sizes[0], 0, math.inf
        for high, wide in self.sizes:
            scale = min(wide / width, high / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            if kept > most or (kept == most and high * wide - kept < waste):
                best, most, waste = (high, wide), kept, high * wide - kept
        return View(best[0] // self.tile, best[1] // self.tile, height, width)

    def known(self, image: Sequence[int] | int) -> View:
        """Of an image of which its View is known, as plain numbers, or how many patches all its views have."""
        return column(max(1, image // self.side**2)) if isinstance(image, int) else View(*image)

    def lines(self, view: View) -> Lines:
        """What is kept of the features of an image's tiles; without its own size, all."""
        high, wide, top, left = view.rows * self.side, view.columns * self.side, 0, 0
        if view.width and view.width / view.height > wide / high:
            top = (high - int(round(view.height * (wide / view.width), 7))) // 2
        elif view.width:
            left = (wide - int(round(view.width * (high / view.height), 7))) // 2
        high, wide = high - 2 * top, wide - 2 * left
        ratio = math.sqrt(high * wide / (self.most * self.side**2)) if self.most else 0
        rows, columns = (int(high // ratio), int(wide // ratio)) if ratio > 1.1 else (high, wide)
        return Lines(top, left, high, wide, rows, columns)

    def tokens(self, view: View) -> int:
        """Features of an image, with those of newlines."""
        if not view.rows:
            return self.side**2 + 1
        lines = self.lines(view)
        return self.side**2 + lines.rows * (lines.columns + 1)

    def cut(self, image: Image.Image, view: View, resample: int) -> list[Image.Image]:
        """An RGB image: the whole, then its tiles row by row."""
        whole = image.resize((self.tile, self.tile), resample=resample)
        if not view.rows:
            return [whole]
        wide, high = view.columns * self.tile, view.rows * self.tile
        across, down = wide / image.width, high / image.height
        if across < down:
            size = wide, min(math.ceil(image.height * across), high)
        else:
            size = min(math.ceil(image.width * down), wide), high
        canvas = Image.new("RGB", (wide, high))
        canvas.paste(image.resize(size, resample=resample), ((wide - size[0]) // 2, (high - size[1]) // 2))
        return [whole, *cut(canvas, self.tile)]


def anyres(hf: Any, tile: int, side: int) -> AnyRes:
    """Of transformers' config object of a model whose tower takes ``tile`` pixels, ``side`` patches, a side.

    Raises:
        ConfigError: sizes that are not whole tiles; a ``vision_aspect_ratio`` that is not built.
    """
    ratio = getattr(hf, "vision_aspect_ratio", None)
    most = None if ratio is None else ratio.removeprefix("anyres_max_")
    if most is not None and not (most.isascii() and most.isdigit() and int(most)):
        raise ConfigError(f"vision_aspect_ratio {ratio!r} is not built: anyres_max_9 is, or of another number")
    sizes = tuple((int(height), int(width)) for height, width in hf.image_grid_pinpoints)
    return AnyRes(sizes=sizes, tile=tile, side=side, most=most and int(most))
