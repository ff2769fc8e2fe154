"""LLaVA's processor: prompts of a template, and images equal to those of transformers' ``LlavaImageProcessor``.

images --upright RGB --(padded to a square)--> resized, cropped to S x S--> uint8 --table--> float32 [3, S, S]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images.pictures import pad_to_square, resize_and_crop
from megatron_vlm.data.text.templates import IMAGE
from megatron_vlm.errors import ConfigError
from megatron_vlm.files import read_json
from megatron_vlm.models.families.llava_internlm2.config import LlavaModelConfig
from megatron_vlm.models.processing.pixels import CLIP, NormalisedPixels, pixel_fields
from megatron_vlm.models.processing.processor_files import check_image_settings, processor_settings
from megatron_vlm.models.processing.template_processor import TemplateProcessor, prompt_settings


@dataclass(frozen=True, kw_only=True)
class LlavaProcessor(NormalisedPixels, TemplateProcessor):
    """Encodes samples for LLaVA.

    Attributes:
        image_size: S, side of the tower's images in pixels.
        patch_size: of the tower.
        pad: an image is first padded to a square, in the colour of the mean; else what lies beyond a square is cut off.
    """

    image_size: int
    patch_size: int
    pad: bool

    @classmethod
    def from_pretrained(cls, hf_dir: str | Path, config: DataConfig) -> "LlavaProcessor":
        """Reads tokenizer, processor and model configuration of an HF folder.

        Raises:
            ConfigError: a file is missing, or a setting that is not built or cannot work.
        """
        hf_dir = Path(hf_dir)
        model = LlavaModelConfig.from_hf(read_json(hf_dir / "config.json"))
        side = model.vision.image_size
        check_image_settings(config, "LLaVA", "max_image_num", "image_size")
        if config.image_size not in (None, side):
            raise ConfigError(f"data.image_size {config.image_size}: the CLIP tower takes {side} only; leave it out")
        _, images = processor_settings(hf_dir)
        if images.get("do_pad") and config.jpeg_scaled_decoding:
            raise ConfigError(
                f"data.jpeg_scaled_decoding has no effect here: with do_pad ({hf_dir}) images are padded to squares in full size "
                "before they are resized: leave it out"
            )
        pixels = pixel_fields(hf_dir, images, "LLaVA", Image.Resampling.BICUBIC, CLIP, steps=["do_center_crop"])
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
            **pixels,
            image_token_id=model.image_token_id,
            image_size=side,
            patch_size=model.vision.patch_size,
            pad=bool(images.get("do_pad", False)),
        )

    @property
    def tokens_per_image(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def patches_per_image(self) -> int:
        return self.tokens_per_image

    def pixels(self, image: Image.Image) -> torch.Tensor:
        if self.pad:
            image = pad_to_square(image, tuple(int(value * 255) for value in self.mean))
        return self.normalised(resize_and_crop(image, self.image_size, self.resample))


def _sides(size: Mapping[str, Any] | int) -> list[int]:
    return list(size.values()) if isinstance(size, Mapping) else [size]


def stop_ids(hf_dir: Path) -> tuple[int, ...]:
    """Ids that end an answer of a model with the tokenizer files of ``hf_dir``."""
    return LlavaProcessor.from_pretrained(hf_dir, DataConfig(seq_length=2)).stop_ids
