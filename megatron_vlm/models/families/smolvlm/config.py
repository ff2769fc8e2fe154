"""Configuration of Idefics3 and SmolVLM, resolved from an HF config.json through transformers' own config classes."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_vlm.config import Config
from megatron_vlm.data.config import DataConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.parts.decoder import TextConfig, text_config
from megatron_vlm.models.parts.siglip import SiglipConfig
from megatron_vlm.models.processing.image_cost import ImageCost

KINDS: dict[str, Literal["Idefics3", "SmolVLM"]] = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}
"""model_type -> how transformers' classes are called."""


@dataclass(frozen=True, kw_only=True)
class SmolVLMModelConfig(Config):
    """The whole model.

    Attributes:
        text, vision: decoder and tower.
        shuffle: side of the block of patches that becomes one token.
        image_token_id: marks the positions that image features overwrite.
        kind: transformers' classes of the model.
    """

    text: TextConfig
    vision: SiglipConfig
    shuffle: int
    image_token_id: int
    kind: Literal["Idefics3", "SmolVLM"]

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile."""
        return (self.vision.side // self.shuffle) ** 2

    def expected_image(self, data: DataConfig) -> tuple[int, int, int]:
        """[C, S, S]: each tile is an image of its own to the tower."""
        return self.vision.num_channels, self.vision.image_size, self.vision.image_size

    def image_cost(self, image: tuple[int, int, int]) -> ImageCost:
        """Cost of one tile [C, S, S]."""
        patches = (image[1] // self.vision.patch_size) * (image[2] // self.vision.patch_size)
        linear = 2.0 * patches * self.vision.hidden_size * self.text.hidden_size
        return ImageCost(patches=patches, segments=(patches,), features=patches // self.shuffle**2, connector=linear)

    @classmethod
    def from_hf(cls, hf_config: dict[str, Any]) -> "SmolVLMModelConfig":
        """Resolves a config.json's content; transformers fills in the defaults, nothing is assumed here.

        Raises:
            ConfigError: another model's config, or a feature that is not built.
        """
        import transformers

        kind = KINDS.get(hf_config.get("model_type", ""))
        if kind is None:
            raise ConfigError(f"model_type must be {' or '.join(KINDS)}, this one has {hf_config.get('model_type')!r}")
        hf = getattr(transformers, f"{kind}Config").from_dict(dict(hf_config))
        vision = SiglipConfig.from_hf(hf.vision_config.to_dict())
        if hf.scale_factor < 1 or vision.side % hf.scale_factor:
            raise ConfigError(
                f"scale_factor {hf.scale_factor} does not divide the {vision.side} patches of a side of the tower's images"
            )
        return cls(
            vision=vision,
            text=text_config(hf.text_config, hf.tie_word_embeddings),
            shuffle=hf.scale_factor,
            image_token_id=hf.image_token_id,
            kind=kind,
        )
