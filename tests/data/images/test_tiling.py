"""Grids of tiles against published tables and transformers, HD images against the published transform."""

import math
import random

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from megatron_vlm.data.images import tiling

CHINA = Image.fromarray(load_sample_image("china.jpg"))
# (width, height) -> columns, rows at most 12 tiles of 448 pixels: the table of the published semantics.
TABLE = {
    (448, 448): (1, 1),
    (800, 600): (4, 3),
    (1920, 1080): (4, 2),
    (600, 1600): (2, 5),
    (1, 200): (1, 12),
    (900, 10): (12, 1),
}


def test_grids_equal_the_table_and_transformers():
    for (width, height), grid in TABLE.items():
        assert tiling.best_grid(width, height, 448, 1, 12) == grid, (width, height)
    assert tiling.num_tiles(800, 600, 448, 1, 12, True) * 256 == 3328
    draw = random.Random(0)
    for _ in range(3000):
        width, height, most = draw.randint(1, 2000), draw.randint(1, 2000), draw.choice((1, 2, 3, 6, 12, 24))
        least = draw.randint(1, most)
        theirs = get_optimal_tiled_canvas((height, width), (448, 448), least, most)
        assert tiling.best_grid(width, height, 448, least, most) == theirs


def published_hd(image, hd_num):
    """The original's transform, step by step."""
    turned = image.width < image.height
    if turned:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio, scale = image.width / image.height, 1
    while scale * math.ceil(scale / ratio) <= hd_num:
        scale += 1
    scale -= 1
    image = image.resize((scale * 336, int(scale * 336 / ratio)), Image.Resampling.BILINEAR)
    target = math.ceil(image.height / 336) * 336
    top = int((target - image.height) / 2)
    values = np.full((target, image.width, 3), 255, dtype=np.uint8)
    values[top : top + image.height] = np.asarray(image)
    image = Image.fromarray(values)
    return image.transpose(Image.Transpose.TRANSPOSE) if turned else image


def test_hd_pixels_equal_the_published_transform():
    for image in (CHINA, CHINA.rotate(90, expand=True), CHINA.crop((0, 0, 500, 61)), CHINA.resize((31, 40))):
        for hd_num in (1, 6):
            assert np.array_equal(
                np.asarray(tiling.hd_transform(image, hd_num, 336)), np.asarray(published_hd(image, hd_num))
            )
