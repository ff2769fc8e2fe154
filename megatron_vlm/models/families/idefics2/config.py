"""Configuration of Idefics2, resolved from an HF config.json through transformers' own config class."""

from dataclasses import dataclass
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.data.config import DataConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.parts.decoder import TextConfig, text_config
from megatron_vlm.models.parts.perceiver import PerceiverConfig
from megatron_vlm.models.parts.siglip import SiglipConfig
from megatron_vlm.models.processing.image_cost import ImageCost


@dataclass(frozen=True, kw_only=True)
class Idefics2ModelConfig(Config):
    """The whole model; ``image_token_id`` marks the positions that image features overwrite."""

    text: TextConfig
    vision: SiglipConfig
    perceiver: PerceiverConfig
    image_token_id: int

    def expected_image(self, data: DataConfig) -> tuple[int, int, int]:
        """[C, H, W] of the largest image that ``data`` lets through."""
        size = data.image_size or self.vision.image_size
        return self.vision.num_channels, size, size

    def image_cost(self, image: tuple[int, int, int]) -> ImageCost:
        """Cost of one image [C, H, W]."""
        hidden = self.text.hidden_size
        patches = (image[1] // self.vision.patch_size) * (image[2] // self.vision.patch_size)
        projection = 2 * patches * self.text.ffn_hidden_size * (2 * self.vision.hidden_size + hidden)
        return ImageCost(
            patches=patches,
            segments=(patches,),
            features=self.perceiver.num_latents,
            connector=float(projection + self.perceiver.flops(patches, hidden)),
        )

    @classmethod
    def from_hf(cls, hf_config: dict[str, Any]) -> "Idefics2ModelConfig":
        """Resolves a config.json's content; transformers fills in the defaults, nothing is assumed here.

        Raises:
            ConfigError: not an Idefics2 config, or a feature that is not built.
        """
        from transformers import Idefics2Config

        if hf_config.get("model_type") != "idefics2":
            raise ConfigError(
                f"an Idefics2 config has model_type 'idefics2', this one has {hf_config.get('model_type')!r}"
            )
        hf = Idefics2Config.from_dict(dict(hf_config))
        return cls(
            vision=SiglipConfig.from_hf(hf.vision_config.to_dict()),
            perceiver=PerceiverConfig.from_hf(hf.perceiver_config.to_dict()),
            text=text_config(hf.text_config, hf.tie_word_embeddings),
            image_token_id=hf.image_token_id,
        )
