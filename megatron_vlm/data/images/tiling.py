"""Images cut into square tiles of one size: InternVL's dynamic tiling, the HD grid of InternLM-XComposer2-4KHD, Idefics3's.

    dynamic: image --the grid of nearest aspect ratio, stretched--> tiles row by row (and the whole as a thumbnail, last)
    HD:      image --as many tiles along the longer side as allowed, aspect ratio kept--> centred on white, whole tiles

Semantics: InternVL, internvl_chat/internvl/train/dataset.py, ``dynamic_preprocess``, the same as transformers 5.23,
models/got_ocr2/image_processing_pil_got_ocr2.py, and models/idefics3; InternLM-XComposer2-4KHD, ixc_utils.py, ``HD_transform``.
"""

import functools
import math

from PIL import Image

WHITE = (255, 255, 255)


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
    found = cut(image.resize((columns * side, rows * side), resample=resample), side)
    return [*found, image.resize((side, side), resample=resample)] if thumbnail and len(found) > 1 else found


def cut(canvas: Image.Image, side: int) -> list[Image.Image]:
    """Cuts an image of whole tiles into them, row by row."""
    corners = [(x, y) for y in range(0, canvas.height, side) for x in range(0, canvas.width, side)]
    return [canvas.crop((x, y, x + side, y + side)) for x, y in corners]


def whole_tiles(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height grown to whole tiles as Idefics3 does: the longer edge first, the other by the shape before."""
    shape = width / height
    if width >= height:
        width = math.ceil(width / side) * side
        return width, math.ceil(int(width / shape) / side) * side
    height = math.ceil(height / side) * side
    return math.ceil(int(height * shape) / side) * side, height


def hd_size(width: int, height: int, hd_num: int, tile: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the grid (rows, columns) of an image and its size (width, height) on it, before it is padded to whole tiles.

    The longer side becomes as many tiles as ``hd_num`` tiles in all allow; smaller images grow.
    """
    longer, ratio = max(width, height), max(width, height) / min(width, height)
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= hd_num:
        scale += 1
    longer, shorter = tile * scale, max(1, int(tile * scale / ratio))
    across = math.ceil(shorter / tile)
    if width < height:
        return (scale, across), (shorter, longer)
    return (across, scale), (longer, shorter)


def hd_transform(image: Image.Image, hd_num: int, tile: int) -> Image.Image:
    """Resizes an RGB image to its grid and centres it there on white."""
    if image.width < image.height:  # turned, as in the original: PIL rounds between its two passes
        turned = hd_transform(image.transpose(Image.Transpose.TRANSPOSE), hd_num, tile)
        return turned.transpose(Image.Transpose.TRANSPOSE)
    (rows, columns), size = hd_size(*image.size, hd_num, tile)
    canvas = Image.new("RGB", (columns * tile, rows * tile), WHITE)
    canvas.paste(image.resize(size, Image.Resampling.BILINEAR), (0, (rows * tile - size[1]) // 2))
    return canvas
