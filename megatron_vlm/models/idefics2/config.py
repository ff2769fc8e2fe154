"""Configuration of Idefics2, resolved from an HF config.json through transformers' own config class."""

from dataclasses import dataclass
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.data.config import DataConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.image_cost import ImageCost
from megatron_vlm.models.text import TextConfig, text_config


@dataclass(frozen=True, kw_only=True)
class VisionConfig(Config):
    """The SigLIP NaViT tower. ``image_size // patch_size`` is the side of its position table."""

    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    num_channels: int
    norm_epsilon: float

    @property
    def side(self) -> int:
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class PerceiverConfig(Config):
    """The perceiver resampler."""

    num_latents: int
    depth: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    norm_epsilon: float


@dataclass(frozen=True, kw_only=True)
class Idefics2ModelConfig(Config):
    """The whole model; ``image_token_id`` marks the positions that image features overwrite."""

    text: TextConfig
    vision: VisionConfig
    perceiver: PerceiverConfig
    image_token_id: int

    def vision_sharded(self, tp: int) -> bool:
        """The tower is split over ``tp`` ranks (else it runs whole on each)."""
        return self.vision.num_attention_heads % tp == 0 and self.vision.ffn_hidden_size % tp == 0

    def perceiver_sharded(self, tp: int) -> bool:
        """The resampler's attention is split over ``tp`` ranks (else it runs whole on each)."""
        heads, groups, width = (
            getattr(self.perceiver, n) for n in ("num_attention_heads", "num_query_groups", "head_dim")
        )
        return heads % tp == 0 and (groups % tp == 0 or tp % groups == 0) and groups * width % tp == 0

    def expected_image(self, data: DataConfig) -> tuple[int, int, int]:
        """[C, H, W] of the largest image that ``data`` lets through."""
        size = data.image_size or self.vision.image_size
        return self.vision.num_channels, size, size

    def image_cost(self, image: tuple[int, int, int]) -> ImageCost:
        """Cost of one image [C, H, W]."""
        perceiver, h = self.perceiver, self.text.hidden_size
        patches = (image[1] // self.vision.patch_size) * (image[2] // self.vision.patch_size)
        n, keys = perceiver.num_latents, patches + perceiver.num_latents
        q, kv = perceiver.num_attention_heads * perceiver.head_dim, perceiver.num_query_groups * perceiver.head_dim
        projection = 2 * patches * self.text.ffn_hidden_size * (2 * self.vision.hidden_size + h)
        # Queries and output; keys and values; scores and their product with the values; gated MLP of width 4 h.
        layer = 4 * n * h * q + 4 * keys * h * kv + 4 * n * keys * q + 24 * n * h**2
        return ImageCost(
            patches=patches, segments=(patches,), features=n, connector=float(projection + perceiver.depth * layer)
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
        text, vision, perceiver = hf.text_config, hf.vision_config, hf.perceiver_config
        if text.model_type not in ("mistral", "llama"):
            raise ConfigError(f"Idefics2's text model must be mistral or llama, got {text.model_type!r}")
        for name, value, wanted in (
            ("vision_config.hidden_act", vision.hidden_act, "gelu_pytorch_tanh"),
            ("perceiver_config.hidden_act", perceiver.hidden_act, "silu"),
        ):
            if value != wanted:
                raise ConfigError(f"{name} {value!r} is not built: only {wanted!r} is")
        return cls(
            text=text_config(text, hf.tie_word_embeddings),
            vision=VisionConfig(
                hidden_size=vision.hidden_size,
                ffn_hidden_size=vision.intermediate_size,
                num_layers=vision.num_hidden_layers,
                num_attention_heads=vision.num_attention_heads,
                image_size=vision.image_size,
                patch_size=vision.patch_size,
                num_channels=vision.num_channels,
                norm_epsilon=vision.layer_norm_eps,
            ),
            perceiver=PerceiverConfig(
                num_latents=perceiver.resampler_n_latents,
                depth=perceiver.resampler_depth,
                num_attention_heads=perceiver.resampler_n_heads,
                num_query_groups=perceiver.num_key_value_heads,
                head_dim=perceiver.resampler_head_dim,
                norm_epsilon=perceiver.rms_norm_eps,
            ),
            image_token_id=hf.image_token_id,
        )
