"""Configuration of Gemma 3, resolved from an HF config.json through transformers' own config class."""

import math
from dataclasses import dataclass
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.data.config import DataConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.hf_config import require
from megatron_vlm.models.parts.decoder import TextConfig
from megatron_vlm.models.parts.gemma import gemma3_text_config
from megatron_vlm.models.parts.siglip import SiglipConfig
from megatron_vlm.models.processing.image_cost import ImageCost


@dataclass(frozen=True, kw_only=True)
class Gemma3ModelConfig(Config):
    """The whole model.

    Attributes:
        text, vision: decoder and tower.
        pool: side of the block of patches whose mean becomes one token.
        image_token_id: marks the positions that image features overwrite.
    """

    text: TextConfig
    vision: SiglipConfig
    pool: int
    image_token_id: int

    @property
    def image_tokens(self) -> int:
        """Tokens of an image."""
        return (self.vision.side // self.pool) ** 2

    def expected_image(self, data: DataConfig) -> tuple[int, int, int]:
        """[C, S, S]: all images are squares of one size."""
        return self.vision.num_channels, self.vision.image_size, self.vision.image_size

    def image_cost(self, image: tuple[int, int, int]) -> ImageCost:
        """Cost of one image [C, S, S]."""
        patches = (image[1] // self.vision.patch_size) * (image[2] // self.vision.patch_size)
        features = patches // self.pool**2
        linear = 2.0 * features * self.vision.hidden_size * self.text.hidden_size
        return ImageCost(patches=patches, segments=(patches,), features=features, connector=linear)

    @classmethod
    def from_hf(cls, hf_config: dict[str, Any]) -> "Gemma3ModelConfig":
        """Resolves a config.json's content; transformers fills in the defaults, nothing is assumed here.

        Raises:
            ConfigError: another model's config, or a feature that is not built.
        """
        from transformers import Gemma3Config

        if hf_config.get("model_type") != "gemma3":
            raise ConfigError(f"a Gemma 3 config has model_type gemma3, this one has {hf_config.get('model_type')!r}")
        hf = Gemma3Config.from_dict(dict(hf_config))
        vision = hf.vision_config.to_dict()
        require("vision_config.model_type", vision["model_type"], "siglip_vision_model")
        require("vision_config.vision_use_head", vision.get("vision_use_head", True), False)
        tower, side = SiglipConfig.from_hf(vision), math.isqrt(hf.mm_tokens_per_image)
        if side**2 != hf.mm_tokens_per_image or not side or tower.side % side:
            raise ConfigError(
                f"mm_tokens_per_image {hf.mm_tokens_per_image} is no square whose side divides the {tower.side} patches of a "
                "side of the tower's images"
            )
        return cls(
            text=gemma3_text_config(hf.text_config, bool(hf.tie_word_embeddings)),
            vision=tower,
            pool=tower.side // side,
            image_token_id=hf.image_token_index,
        )
