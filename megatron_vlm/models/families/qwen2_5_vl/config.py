"""Configuration of Qwen2.5-VL, resolved from an HF config.json (nested, or flat as published) through transformers' own class."""

import math
from dataclasses import dataclass
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.data.config import DataConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.parts.decoder import TextConfig, text_config
from megatron_vlm.models.parts.qwen_vit import QwenVitConfig
from megatron_vlm.models.processing.image_cost import ImageCost

_MAX_PIXELS = 12_845_056  # of the published models' processor files, where the data section does not say


@dataclass(frozen=True, kw_only=True)
class Qwen25VLConfig(Config):
    """The whole model; ``image_token_id`` is that of ``<|image_pad|>``."""

    text: TextConfig
    vision: QwenVitConfig
    image_token_id: int

    def expected_image(self, data: DataConfig) -> tuple[int, int, int]:
        """[C, H, W] of the largest image that ``data`` lets through, near a square."""
        unit = self.vision.unit
        blocks = max(1, min((data.max_pixels or _MAX_PIXELS) // unit**2, data.seq_length - 1))
        rows = math.isqrt(blocks)
        return self.vision.num_channels, rows * unit, blocks // rows * unit

    def image_cost(self, image: tuple[int, int, int]) -> ImageCost:
        """Cost of one image [C, H, W]."""
        return self.vision.image_cost(image, self.text.hidden_size)

    @classmethod
    def from_hf(cls, hf_config: dict[str, Any]) -> "Qwen25VLConfig":
        """Resolves a config.json's content.

        Raises:
            ConfigError: not Qwen2.5-VL's config, or a feature that is not built.
        """
        from transformers import Qwen2_5_VLConfig

        if hf_config.get("model_type") != "qwen2_5_vl":
            raise ConfigError(
                f"a Qwen2.5-VL config has model_type qwen2_5_vl, this one has {hf_config.get('model_type')!r}"
            )
        hf = Qwen2_5_VLConfig.from_dict(dict(hf_config))
        hf.text_config.rope_parameters.setdefault("mrope_section", [16, 24, 24])  # as transformers' model does
        text = text_config(hf.text_config, bool(hf.tie_word_embeddings))
        return cls(
            text=text,
            vision=QwenVitConfig.from_hf(hf.vision_config.to_dict(), text.hidden_size),
            image_token_id=hf.image_token_id,
        )
