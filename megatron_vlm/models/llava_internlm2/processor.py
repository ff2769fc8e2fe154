"""LLaVA's processor: prompts of a template, and images equal to those of transformers' ``LlavaImageProcessor``.

images --upright RGB --(padded to a square)--> resized, cropped to S x S--> uint8 --table--> float32 [3, S, S]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images import normalise_table
from megatron_vlm.data.templates import IMAGE
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.processor_files import check_image_settings, processor_settings, read_json
from megatron_vlm.models.template_processor import TemplateProcessor, prompt_settings

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training images."""


@dataclass(frozen=True, kw_only=True)
class LlavaProcessor(TemplateProcessor):
    """Encodes samples for LLaVA.

    Attributes:
        image_size: S, side of the tower's images in pixels.
        patch_size: of the tower.
        pad: an image is first padded to a square, in the colour of the mean; else what lies beyond a square is cut off.
        resample: PIL's code of the resampling filter.
        rescale, mean, std: normalisation, per channel.
    """

    image_size: int
    patch_size: int
    pad: bool
    resample: int
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_pretrained(cls, hf_dir: str | Path, config: DataConfig) -> "LlavaProcessor":
        """Reads tokenizer, processor and model configuration of an HF folder.

        Raises:
            ConfigError: a file is missing, or a setting that is not built or cannot work.
        """
        hf_dir = Path(hf_dir)
        from megatron_vlm.models.llava_internlm2.config import LlavaModelConfig

        model = LlavaModelConfig.from_hf(read_json(hf_dir / "config.json"))
        side = model.vision.image_size
        check_image_settings(config, "LLaVA", "max_image_num", "image_size")
        if config.image_size not in (None, side):
            raise ConfigError(f"data.image_size {config.image_size}: the CLIP tower takes {side} only; leave it out")
        _, images = processor_settings(hf_dir)
        for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
            if not images.get(name, True):
                raise ConfigError(f"{hf_dir}: {name} false is not built for LLaVA")
        for name in ("size", "crop_size"):
            if name in images and set(_sides(images[name])) != {side}:
                raise ConfigError(f"{hf_dir}: {name} {images[name]} does not give the tower's {side} x {side} pixels")
        prompt = prompt_settings(hf_dir, config, "llava_internlm2", model.text.vocab_size)
        if prompt["tokenizer"].token_id(IMAGE) != model.image_token_id:
            raise ConfigError(
                f"{hf_dir}: config.json has image_token_index {model.image_token_id}, the tokenizer has "
                f"{prompt['tokenizer'].token_id(IMAGE)} for {IMAGE}"
            )
        return cls(
            **prompt,
            image_token_id=model.image_token_id,
            image_size=side,
            patch_size=model.vision.patch_size,
            pad=bool(images.get("do_pad", False)),
            resample=int(images.get("resample", Image.Resampling.BICUBIC)),
            rescale=float(images.get("rescale_factor", 1 / 255)),
            mean=tuple(images.get("image_mean") or MEAN),
            std=tuple(images.get("image_std") or STD),
        )

    @property
    def tokens_per_image(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def patches_per_image(self) -> int:
        return self.tokens_per_image

    @cached_property
    def _table(self) -> np.ndarray:
        return normalise_table(self.rescale, self.mean, self.std)

    def pixels(self, image: Image.Image) -> torch.Tensor:
        if self.pad:
            image = pad_to_square(image, tuple(int(value * 255) for value in self.mean))
        values = np.asarray(resize_and_crop(image, self.image_size, self.resample))
        return torch.from_numpy(np.stack([row[values[:, :, channel]] for channel, row in enumerate(self._table)]))


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Centres an image on a square of its longer side."""
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def resize_and_crop(image: Image.Image, side: int, resample: int) -> Image.Image:
    """Resizes the shorter edge to ``side``, rounded down as transformers does, and cuts out the middle."""
    width, height = image.size
    size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return image.resize(size, resample=resample).crop((left, top, left + side, top + side))


def _sides(size: Mapping[str, Any] | int) -> list[int]:
    return list(size.values()) if isinstance(size, Mapping) else [size]
