"""Configuration of Gemma 3, resolved from an HF config.json through transformers' own config class."""

import math
from dataclasses import dataclass
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.data.config import DataConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.layers.rope import RopeScaling
from megatron_vlm.models.hf_config import require
from megatron_vlm.models.parts.decoder import TextConfig
from megatron_vlm.models.parts.siglip import SiglipConfig
from megatron_vlm.models.processing.image_cost import ImageCost

LOCAL, GLOBAL = "sliding_attention", "full_attention"


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


def gemma3_text_config(hf: Any, tie_word_embeddings: bool) -> TextConfig:
    """Resolves transformers' config of the decoder.

    Raises:
        ConfigError: a feature that is not built.
    """
    for name, value, wanted in (
        ("hidden_activation", hf.hidden_activation, "gelu_pytorch_tanh"),
        ("attention_bias", bool(hf.attention_bias), False),
        ("use_bidirectional_attention", bool(hf.use_bidirectional_attention), False),
        ("final_logit_softcapping", hf.final_logit_softcapping, None),
        ("attn_logit_softcapping", hf.attn_logit_softcapping, None),
        ("rope_parameters of sliding_attention: rope_type", hf.rope_parameters[LOCAL]["rope_type"], "default"),
    ):
        require(f"text_config.{name}", value, wanted)
    if unknown := set(hf.layer_types) - {LOCAL, GLOBAL}:
        raise ConfigError(f"text_config.layer_types has {', '.join(sorted(unknown))}: {LOCAL} and {GLOBAL} are built")
    rope, local = (hf.rope_parameters[kind] for kind in (GLOBAL, LOCAL))
    windows = LOCAL in hf.layer_types
    return TextConfig(
        model_type=hf.model_type,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        head_dim=hf.head_dim,
        vocab_size=hf.vocab_size,
        max_position_embeddings=hf.max_position_embeddings,
        norm_epsilon=hf.rms_norm_eps,
        rotary_base=float(rope["rope_theta"]),
        rope_scaling=RopeScaling.read(rope),
        tie_word_embeddings=tie_word_embeddings,
        qk_norm=True,
        sliding_window=hf.sliding_window if windows else None,
        full_layers=tuple(i for i, kind in enumerate(hf.layer_types) if windows and kind == GLOBAL),
        local_rotary_base=float(local["rope_theta"]) if windows else None,
        gemma=True,
        embedding_scale=hf.hidden_size**0.5,
        attention_scale=hf.query_pre_attn_scalar**-0.5,
        image_blocks=True,
    )
