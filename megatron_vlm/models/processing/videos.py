"""What prompts and pixels of videos need: numbers in English words, and frames resized as transformers' video processors do.

These resize by torchvision, which is torch's own kernel on 8 bits; Pillow's results, which images have here, differ from it by a
grey level or two.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from megatron_vlm.models.processing.pixels import NormalisedPixels

# fmt: off
_SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
# fmt: on
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_MODES = {
    Image.Resampling.BILINEAR: "bilinear",
    Image.Resampling.BICUBIC: "bicubic",
    Image.Resampling.LANCZOS: "lanczos",
}


def in_words(number: int) -> str:
    """``in_words(1128) == "one thousand, one hundred and twenty-eight"``, as num2words; of 0 to 999,999."""
    if number < 20:
        return _SMALL[number]
    if number < 100:
        tens, rest = _TENS[number // 10 - 2], number % 10
        return f"{tens}-{_SMALL[rest]}" if rest else tens
    unit, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    head, rest = f"{in_words(number // unit)} {name}", number % unit
    join = " and " if rest < 100 else ", "
    return f"{head}{join}{in_words(rest)}" if rest else head


@dataclass(frozen=True, kw_only=True)
class FramePixels(NormalisedPixels):
    """Fields of a processor whose frames of videos are made as by torchvision, its images as by Pillow."""

    @cached_property
    def _frame_table(self) -> np.ndarray:
        """float32 [C, 256]: rescaling and normalising in one, as ``TorchvisionBackend.rescale_and_normalize`` does."""
        whole = np.float32(1.0 / self.rescale)
        mean, std = (np.array(values, dtype=np.float32)[:, None] * whole for values in (self.mean, self.std))
        return (np.arange(256, dtype=np.float32)[None] - mean) / std

    def frame(self, image: Image.Image, *sizes: tuple[int, int]) -> torch.Tensor:
        """An RGB image resized to each (width, height) after the other, normalised: float32 [3, H, W]."""
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, image.height, image.width, 3)
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
        mode = _MODES[Image.Resampling(self.resample)]
        for width, height in sizes:
            if pixels.shape[-2:] != (height, width):
                pixels = F.interpolate(pixels, (height, width), mode=mode, antialias=True, align_corners=False)
        table = torch.from_numpy(self._frame_table)
        return torch.stack([row[channel.int()] for row, channel in zip(table, pixels[0])])
