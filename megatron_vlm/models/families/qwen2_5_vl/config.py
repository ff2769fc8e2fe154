"""Configuration of Qwen2.5-VL, resolved from an HF config.json (nested, or flat as published) through transformers' own class."""

from dataclasses import dataclass
from typing import Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.parts.decoder import text_config
from megatron_vlm.models.parts.qwen_vit import Qwen25VitConfig, QwenVLConfig


@dataclass(frozen=True, kw_only=True)
class Qwen25VLConfig(QwenVLConfig):
    """The whole model.

    Attributes:
        video_token_id: of ``<|video_pad|>``.
        tokens_per_second: positions that a second of a video takes.
    """

    MAX_PIXELS = 12_845_056

    vision: Qwen25VitConfig
    video_token_id: int
    tokens_per_second: float

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
            vision=Qwen25VitConfig.from_hf(hf.vision_config.to_dict(), text.hidden_size),
            image_token_id=hf.image_token_id,
            video_token_id=hf.video_token_id,
            tokens_per_second=hf.vision_config.tokens_per_second,
        )
