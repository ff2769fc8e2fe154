"""Gemma 3's decoder, of local and global layers: its configuration, read from transformers'; weight map: ``decoder.py``."""

from typing import Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.layers.rope import RopeScaling
from megatron_vlm.models.hf_config import require
from megatron_vlm.models.parts.decoder import TextConfig

LOCAL, GLOBAL = "sliding_attention", "full_attention"


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
