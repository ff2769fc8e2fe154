"""Settings of image processors, and the pixels they make."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.processing.pixels import CLIP, HALF, NormalisedPixels, pixel_fields


def test_what_is_not_said_is_the_familys():
    fields = pixel_fields(Path("m"), {}, "x", Image.Resampling.BICUBIC, CLIP)
    assert fields == {"resample": 3, "rescale": 1 / 255, "mean": CLIP[0], "std": CLIP[1]}
    said = {"resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "rescale_factor": 0.5}
    fields = pixel_fields(Path("m"), said, "x", Image.Resampling.BICUBIC, CLIP)
    assert fields == {"resample": 2, "rescale": 0.5, "mean": (0.1, 0.2, 0.3), "std": (1, 2, 3)}


@pytest.mark.parametrize("step", ["do_normalize", "do_pad"])
def test_a_step_that_is_turned_off_is_refused(step):
    with pytest.raises(ConfigError, match=f"m: {step} false is not built for x"):
        pixel_fields(Path("m"), {step: False}, "x", Image.Resampling.BICUBIC, CLIP, ["do_pad"])


def test_images_are_normalised_one_below_the_other():
    made = NormalisedPixels(resample=3, rescale=1 / 255, mean=HALF[0], std=HALF[1])
    pixels = made.normalised(Image.new("RGB", (4, 2), (255, 0, 51)), Image.new("RGB", (4, 3)))
    assert pixels.shape == (3, 5, 4) and pixels.dtype == torch.float32
    assert torch.allclose(pixels[:, :2].mean((1, 2)), torch.tensor([1.0, -1.0, -0.6]), atol=1e-6)
    assert torch.equal(pixels[:, 2:], torch.full((3, 3, 4), -1.0))
