"""Configuration of InternLM2, read from its config.json: transformers has no class for it, and its own code is not run."""

from dataclasses import dataclass
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.layers.rope import RopeScaling
from megatron_vlm.models.hf_config import require
from megatron_vlm.models.parts.decoder import TextConfig

_NEEDED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class InternLM2ModelConfig(Config):
    """The whole model, which is its decoder."""

    text: TextConfig

    @classmethod
    def from_hf(cls, hf_config: dict[str, Any]) -> "InternLM2ModelConfig":
        """Resolves a config.json's content; see ``internlm2_text_config``."""
        return cls(text=internlm2_text_config(hf_config))


def internlm2_text_config(hf_config: dict[str, Any], model_types: tuple[str, ...] = ("internlm2",)) -> TextConfig:
    """Reads InternLM2's decoder out of the config.json of a model built on it.

    Raises:
        ConfigError: another model, a missing key, or a feature that is not built.
    """
    if hf_config.get("model_type") not in model_types:
        raise ConfigError(f"the model_type must be {' or '.join(model_types)}, got {hf_config.get('model_type')!r}")
    missing = [key for key in _NEEDED if key not in hf_config]
    if missing:
        raise ConfigError(f"InternLM2's config.json lacks {', '.join(missing)}")
    require("InternLM2's hidden_act", hf_config.get("hidden_act", "silu"), "silu")
    if hf_config.get("bias", True):  # true is the default of its own code; every published model says false
        raise ConfigError("InternLM2 with bias true is not built: config.json must say false")
    heads = hf_config["num_attention_heads"]
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    scaling = RopeScaling.read(rope)
    if scaling is not None and scaling.rope_type not in ("linear", "dynamic"):
        raise ConfigError(
            f"rope_type {scaling.rope_type!r} is none that InternLM2's own code reads: linear and dynamic are"
        )
    return TextConfig(
        model_type="internlm2",
        hidden_size=hf_config["hidden_size"],
        ffn_hidden_size=hf_config["intermediate_size"],
        num_layers=hf_config["num_hidden_layers"],
        num_attention_heads=heads,
        num_query_groups=hf_config.get("num_key_value_heads") or heads,
        head_dim=hf_config["hidden_size"] // heads,
        vocab_size=hf_config["vocab_size"],
        max_position_embeddings=hf_config["max_position_embeddings"],
        norm_epsilon=hf_config["rms_norm_eps"],
        rotary_base=float(rope.get("rope_theta") or hf_config.get("rope_theta", 10000.0)),
        tie_word_embeddings=bool(hf_config.get("tie_word_embeddings", False)),
        rope_scaling=scaling,
    )
