"""Configuration of Qwen3-VL, resolved from an HF config.json through transformers' own class."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.parts.decoder import text_config
from megatron_vlm.models.parts.qwen_vit import Qwen3VitConfig, QwenVLConfig


@dataclass(frozen=True, kw_only=True)
class Qwen3VLConfig(QwenVLConfig):
    """The whole model."""

    MAX_PIXELS = 16_777_216

    vision: Qwen3VitConfig

    @classmethod
    def from_hf(cls, hf_config: dict[str, Any]) -> "Qwen3VLConfig":
        """Resolves a config.json's content.

        Raises:
            ConfigError: not Qwen3-VL's config, or a feature that is not built.
        """
        from transformers import Qwen3VLConfig as HFConfig

        if hf_config.get("model_type") != "qwen3_vl":
            raise ConfigError(
                f"a Qwen3-VL config has model_type qwen3_vl, this one has {hf_config.get('model_type')!r}"
            )
        hf = HFConfig.from_dict(dict(hf_config))
        hf.text_config.rope_parameters.setdefault("mrope_section", [24, 20, 20])  # as transformers' model does
        text = text_config(hf.text_config, bool(hf.tie_word_embeddings))
        vision = Qwen3VitConfig.from_hf(hf.vision_config.to_dict(), text.hidden_size)
        if len(vision.levels) > text.num_layers:
            raise ConfigError(
                f"vision_config.deepstack_visual_indexes {list(vision.levels)} are more levels than the decoder has layers, "
                f"{text.num_layers}"
            )
        text = dataclasses.replace(text, deepstack=len(vision.levels))
        return cls(text=text, vision=vision, image_token_id=hf.image_token_id)
