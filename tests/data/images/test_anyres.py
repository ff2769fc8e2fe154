"""Sizes, views and lines of LLaVA-NeXT's images against transformers' own functions, over many shapes."""

import pytest
from PIL import Image
from transformers import LlavaOnevisionConfig
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from megatron_vlm.data.images.anyres import AnyRes, View, anyres, column
from megatron_vlm.errors import ConfigError

SIZES = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
NEXT = AnyRes(sizes=SIZES, tile=336, side=24)
ONE = anyres(LlavaOnevisionConfig(), 384, 27)
SHAPES = [(w, h) for w in (1, 13, 335, 336, 337, 500, 672, 1007, 3000) for h in (1, 200, 336, 501, 673, 1008, 4000)]


def hf_tokens(kind, settings, width, height):
    """As transformers' processor counts them."""
    processor = object.__new__(kind)
    processor.num_image_tokens, processor.vision_aspect_ratio = settings.side**2, "anyres_max_9"
    high, wide = select_best_resolution([height, width], [list(size) for size in settings.sizes])
    return settings.side**2 + sum(
        processor._get_unpadded_features(
            height, width, settings.side, settings.side, high // settings.tile, wide // settings.tile
        )
    )


@pytest.mark.parametrize("kind, settings", [(LlavaNextProcessor, NEXT), (LlavaOnevisionProcessor, ONE)])
def test_views_and_tokens_equal_hf(kind, settings):
    shrunk = 0
    for width, height in SHAPES:
        view = settings.view(width, height)
        best = select_best_resolution([height, width], [list(size) for size in settings.sizes])
        assert (view.rows * settings.tile, view.columns * settings.tile) == best
        assert settings.tokens(view) == hf_tokens(kind, settings, width, height), (width, height)
        lines = settings.lines(view)
        shrunk += lines.rows != lines.height
        assert settings.tokens(view) <= settings.tokens(column(1 + view.rows * view.columns))
    assert bool(shrunk) == (settings is ONE)


def test_an_image_alone_has_its_patches_and_a_newline():
    assert NEXT.tokens(View(0, 0, 9, 5)) == 24 * 24 + 1
    (whole,) = NEXT.cut(Image.new("RGB", (5, 9)), View(0, 0, 9, 5), Image.Resampling.BICUBIC)
    assert whole.size == (336, 336)


def test_tiles_are_cut_row_by_row_from_black():
    """A red image twice as wide as it is high on 2 x 2 tiles: black above and below, by hand."""
    image, view = Image.new("RGB", (100, 50), (255, 0, 0)), View(2, 2, 50, 100)
    whole, *tiles = NEXT.cut(image, view, Image.Resampling.BICUBIC)
    assert whole.getpixel((0, 0)) == (255, 0, 0) and len(tiles) == 4
    assert [tile.getpixel((9, 0))[0] for tile in tiles] == [0, 0, 255, 255]
    assert [tile.getpixel((9, 335))[0] for tile in tiles] == [255, 255, 0, 0]
    assert NEXT.lines(view) == (12, 0, 24, 48, 24, 48)
    assert NEXT.lines(View(2, 2, 0, 0)) == (0, 0, 48, 48, 48, 48)


def test_settings_that_cannot_work():
    with pytest.raises(ConfigError, match=r"image_grid_pinpoints \[\(336, 500\)\] must be whole tiles of 336 pixels"):
        AnyRes(sizes=((336, 500),), tile=336, side=24)
    with pytest.raises(ConfigError, match="vision_aspect_ratio 'square' is not built"):
        anyres(LlavaOnevisionConfig(vision_aspect_ratio="square"), 384, 27)
