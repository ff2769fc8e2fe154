"""InternVL's dynamic tiling: the grid of square tiles that suits an image best, and its pixels.

    image --grid--> columns x rows of tiles (and the whole as a thumbnail, last) --normalise--> [3, tiles * side, side]

Semantics: InternVL, internvl_chat/internvl/train/dataset.py, ``dynamic_preprocess``; the same as transformers 5.23,
models/got_ocr2/image_processing_pil_got_ocr2.py.
"""

import functools
import io
import random

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

JPEG_QUALITIES = (75, 100)


@functools.lru_cache(maxsize=64)
def grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """(columns, rows) of all grids of ``least`` to ``most`` tiles, by their number of tiles."""
    sides = range(1, most + 1)
    every = [(columns, rows) for columns in sides for rows in sides if least <= columns * rows <= most]
    return tuple(sorted(every, key=lambda grid: grid[0] * grid[1]))


@functools.lru_cache(maxsize=4096)
def best_grid(width: int, height: int, side: int, least: int, most: int) -> tuple[int, int]:
    """(columns, rows) of the grid whose aspect ratio is nearest to the image's.

    Of equally near ones the larger is taken while it has less than twice the image's area.
    """
    best, nearest = (1, 1), float("inf")
    for columns, rows in grids(least, most):
        distance = abs(width / height - columns / rows)
        if distance < nearest or (distance == nearest and width * height > 0.5 * side * side * columns * rows):
            best, nearest = (columns, rows), distance
    return best


def num_tiles(width: int, height: int, side: int, least: int, most: int, thumbnail: bool) -> int:
    """Tiles of an image, its thumbnail included."""
    if most == 1:
        return 1
    columns, rows = best_grid(width, height, side, least, most)
    return columns * rows + (thumbnail and columns * rows > 1)


def tiles(image: Image.Image, side: int, least: int, most: int, thumbnail: bool, resample: int) -> list[Image.Image]:
    """Cuts an RGB image into tiles, row by row."""
    columns, rows = (1, 1) if most == 1 else best_grid(*image.size, side, least, most)
    canvas = image.resize((columns * side, rows * side), resample=resample)
    boxes = [(x * side, y * side, (x + 1) * side, (y + 1) * side) for y in range(rows) for x in range(columns)]
    cut = [canvas.crop(box) for box in boxes]
    return [*cut, image.resize((side, side), resample=resample)] if thumbnail and len(cut) > 1 else cut


def degrade(image: Image.Image, draw: random.Random) -> Image.Image:
    """The image after JPEG compression of a random quality."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=draw.randint(*JPEG_QUALITIES))
    return Image.open(buffer).convert("RGB")


def stack(cut: list[Image.Image], table: NDArray[np.float32]) -> torch.Tensor:
    """Normalises tiles by ``table`` (``data.images.normalise_table``): float32 [3, tiles * side, side]."""
    side = cut[0].size[0]
    pixels = np.empty((3, len(cut) * side, side), dtype=np.float32)
    for number, tile in enumerate(cut):
        values = np.asarray(tile)
        for channel, row in enumerate(table):
            out = pixels[channel, number * side : (number + 1) * side]
            np.take(row, values[:, :, channel], out=out, mode="clip")  # clip: without a buffer for ``out``
    return torch.from_numpy(pixels)
