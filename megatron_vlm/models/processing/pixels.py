"""Pixels as image processors of transformers make them: what the families' processors share of their settings and fields."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_vlm.data.images.pictures import normalise, normalise_table
from megatron_vlm.errors import ConfigError

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and standard deviation, per channel, of training images."""
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")


@dataclass(frozen=True, kw_only=True)
class NormalisedPixels:
    """Fields of a processor whose images are resized, rescaled and normalised.

    Attributes:
        resample: PIL's code of the resampling filter.
        rescale, mean, std: normalisation, per channel.
    """

    resample: int
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @cached_property
    def _table(self) -> np.ndarray:
        return normalise_table(self.rescale, self.mean, self.std)

    def normalised(self, *images: Image.Image) -> torch.Tensor:
        """RGB images of one width, one below the other: float32 [3, H, W]."""
        return torch.from_numpy(normalise(images, self._table))


def pixel_fields(
    hf_dir: Path,
    images: dict[str, Any],
    family: str,
    resample: Image.Resampling,
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
    steps: Sequence[str] = (),
) -> dict[str, Any]:
    """Fields of ``NormalisedPixels`` from the settings of an image processor.

    Args:
        hf_dir: they are of.
        images: the settings.
        family: for the error.
        resample, statistics: where they do not say: filter; mean and standard deviation.
        steps: that it makes besides resizing, rescaling, normalising and converting to RGB.

    Raises:
        ConfigError: a step is turned off.
    """
    for name in (*_STEPS, *steps):
        if not images.get(name, True):
            raise ConfigError(f"{hf_dir}: {name} {json.dumps(images[name])} is not built for {family}")
    for name in ("resample", "rescale_factor"):
        if images.get(name, 0) is None:
            raise ConfigError(f"{hf_dir}: {name} null is no number: leave it out for the default")
    return {
        "resample": int(images.get("resample", resample)),
        "rescale": float(images.get("rescale_factor", 1 / 255)),
        "mean": tuple(images.get("image_mean") or statistics[0]),
        "std": tuple(images.get("image_std") or statistics[1]),
    }
