"""Configuration of LLaVA, resolved from the config.json of transformers' LlavaForConditionalGeneration."""

from dataclasses import dataclass
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.data.config import DataConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.hf_config import require
from megatron_vlm.models.parts.clip import ClipConfig
from megatron_vlm.models.parts.decoder import TextConfig, text_config
from megatron_vlm.models.processing.image_cost import ImageCost, projector_flops

SOURCE = "language_model_source"
"""Key of config.json that says what the language model was before it became part of a LLaVA."""


@dataclass(frozen=True, kw_only=True)
class LlavaModelConfig(Config):
    """The whole model.

    Attributes:
        image_token_id: marks the positions that image features overwrite.
        source_type: model_type that the language model had on its own.
        source_vocab_size: and its vocabulary, without ``<image>``.
    """

    text: TextConfig
    vision: ClipConfig
    image_token_id: int
    source_type: str
    source_vocab_size: int

    def expected_image(self, data: DataConfig) -> tuple[int, int, int]:
        """[C, S, S]: all images are of the tower's size."""
        return self.vision.num_channels, self.vision.image_size, self.vision.image_size

    def image_cost(self, image: tuple[int, int, int]) -> ImageCost:
        """Cost of one image."""
        patches = self.vision.side**2
        return ImageCost(
            patches=patches,
            segments=(self.vision.tokens,),
            features=patches,
            connector=projector_flops(patches, self.vision.hidden_size, self.text.hidden_size),
        )

    @classmethod
    def from_hf(cls, hf_config: dict[str, Any]) -> "LlavaModelConfig":
        """Resolves a config.json's content; transformers fills in the defaults, nothing is assumed here.

        Raises:
            ConfigError: not a LLaVA config, or a feature that is not built.
        """
        from transformers import LlavaConfig

        if hf_config.get("model_type") != "llava":
            raise ConfigError(f"a LLaVA config has model_type 'llava', this one has {hf_config.get('model_type')!r}")
        hf = LlavaConfig.from_dict(dict(hf_config))
        strategies = {
            "clip_vision_model": "default",
            "siglip_vision_model": "full",
        }  # without a class token all is features
        tower = hf.vision_config.model_type
        if tower not in strategies:
            raise ConfigError(
                f"vision_config.model_type {tower!r} is not built for LLaVA: one of {', '.join(strategies)} is"
            )
        for name, value, wanted in (
            ("vision_feature_select_strategy", hf.vision_feature_select_strategy, strategies[tower]),
            ("projector_hidden_act", hf.projector_hidden_act, "gelu"),
            ("multimodal_projector_bias", hf.multimodal_projector_bias, True),
        ):
            require(name, value, wanted)
        if not isinstance(hf.vision_feature_layer, int):
            raise ConfigError(f"vision_feature_layer {hf.vision_feature_layer!r} is not built: only one layer is")
        text = text_config(hf.text_config, tie_word_embeddings=hf.tie_word_embeddings)
        source = hf_config.get(SOURCE) or {}
        return cls(
            text=text,
            vision=ClipConfig.from_hf(hf.vision_config.to_dict(), select_layer=hf.vision_feature_layer),
            image_token_id=hf.image_token_id,
            source_type=source.get("model_type", text.model_type),
            source_vocab_size=source.get("vocab_size", text.vocab_size),
        )
