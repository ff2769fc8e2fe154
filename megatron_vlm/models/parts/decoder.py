"""What the families' decoders share: the configuration of a Llama-shaped one, and its weight map in HF's names."""

from dataclasses import dataclass
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.layers.rope import RopeScaling
from megatron_vlm.models.hf_config import require
from megatron_vlm.weights.mapping import ROW, VOCAB, Entry, direct, gated, qkv

_MAX_TP = 64
_NO_BOUND = 1 << 30
_QWEN2, _QWEN3 = ("qwen2", "qwen2_5_vl_text"), ("qwen3", "qwen3_vl_text")
_TYPES = ("llama", "mistral", *_QWEN2, *_QWEN3)


@dataclass(frozen=True, kw_only=True)
class TextConfig(Config):
    """A Llama-shaped decoder: RMSNorm, grouped query attention with RoPE, a gated MLP.

    Attributes:
        model_type: HF's.
        sliding_window: keys a query sees, itself included (Mistral); None: all before it.
        vocab_size: true vocabulary, without padding for tensor parallelism.
        qkv_bias: the query, key and value projections have biases (Qwen2).
        qk_norm: queries and keys are RMS-normed head by head before RoPE, one weight for all heads of a layer (Qwen3).
        rope_scaling: of RoPE beyond trained positions; None: none.
        mrope_section: pairs of dimensions of a head that each of a token's three positions turns, one after the other (M-RoPE);
            empty: a token has one position.
        mrope_interleaved: the three take turns pair by pair, rows and columns in as many turns as they have pairs.
        deepstack: features of so many levels of the tower are added behind its first layers (layers/deepstack.py).
        full_layers: numbers of the layers that see all keys, where the others have the sliding window; empty: all have it.
        local_rotary_base: base of RoPE, unscaled, in layers with the window, where it is another there; None: it is not.
        gemma: Gemma 3's layer: GELU (tanh) in the MLP, norms after attention and MLP too, weights of all norms 1 apart.
        embedding_scale: what embeddings of tokens are times.
        attention_scale: what products of queries and keys are times; None: 1 / sqrt(head_dim).
        image_blocks: tokens of an image see each other both ways.
    """

    model_type: str
    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: float
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None
    mrope_section: tuple[int, ...] = ()
    mrope_interleaved: bool = False
    deepstack: int = 0

    @property
    def feature_size(self) -> int:
        """Width of the features of an image, levels included."""
        return self.hidden_size * (1 + self.deepstack)

    full_layers: tuple[int, ...] = ()
    local_rotary_base: float | None = None
    gemma: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    image_blocks: bool = False

    @property
    def rope_axes(self) -> tuple[int, ...]:
        """Which of a token's positions turns each pair of dimensions; empty: it has one."""
        if self.mrope_interleaved:
            return tuple(i % 3 if i < 3 * self.mrope_section[i % 3] else 0 for i in range(sum(self.mrope_section)))
        return tuple(axis % 3 for axis, count in enumerate(self.mrope_section) for _ in range(count))

    @property
    def longest(self) -> int:
        """Tokens of the longest sample: the positions; under dynamic NTK, which grows with a sample, beyond any."""
        dynamic = self.rope_scaling is not None and self.rope_scaling.rope_type == "dynamic"
        return _NO_BOUND if dynamic else self.max_position_embeddings


def text_config(hf: Any, tie_word_embeddings: bool | None = None) -> TextConfig:
    """Resolves transformers' config of a Llama, Mistral, Qwen2 or Qwen3 model; it has filled in the defaults, nothing is assumed.

    Args:
        hf: transformers' config object.
        tie_word_embeddings: of the whole model, where that decides; None: as ``hf`` says.

    Raises:
        ConfigError: another model, or a feature that is not built.
    """
    if hf.model_type not in _TYPES:
        raise ConfigError(f"the text model must be one of {', '.join(_TYPES)}, got {hf.model_type!r}")
    require("text_config.hidden_act", hf.hidden_act, "silu")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(hf, name, False):
            raise ConfigError(f"text_config.{name} true is not built")
    heads = hf.num_attention_heads
    window = getattr(hf, "sliding_window", None)
    if hf.model_type in (*_QWEN2, *_QWEN3):
        if getattr(hf, "use_sliding_window", False):
            raise ConfigError("text_config.use_sliding_window true is not built for Qwen2 and Qwen3: set it to false")
        window = None
    rope = dict(getattr(hf, "rope_parameters", None) or {})
    section, half = (
        tuple(rope.get("mrope_section") or ()),
        (getattr(hf, "head_dim", None) or hf.hidden_size // heads) // 2,
    )
    if section and sum(section) != half:
        raise ConfigError(f"mrope_section {list(section)} must add up to {half}, half of a head")
    return TextConfig(
        model_type=hf.model_type,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_attention_heads=heads,
        num_query_groups=hf.num_key_value_heads or heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // heads,
        vocab_size=hf.vocab_size,
        max_position_embeddings=hf.max_position_embeddings,
        norm_epsilon=hf.rms_norm_eps,
        rotary_base=float(rope.get("rope_theta", 10000.0)),
        sliding_window=window,
        tie_word_embeddings=bool(hf.tie_word_embeddings if tie_word_embeddings is None else tie_word_embeddings),
        qkv_bias=hf.model_type in _QWEN2,
        qk_norm=hf.model_type in _QWEN3,
        rope_scaling=RopeScaling.read(rope),
        mrope_section=section,
        mrope_interleaved=hf.model_type == "qwen3_vl_text",
    )


def check_tensor_parallel(text: TextConfig, tp: int) -> None:
    """Checks that decoder heads and ffn divide by ``tp``, and that the kv heads are a multiple or a divisor of it.

    Raises:
        ConfigError: they do not; with the sizes that work.
    """

    def legal(size: int) -> bool:
        groups = text.num_query_groups
        even = text.num_attention_heads % size == 0 and text.ffn_hidden_size % size == 0
        return even and (groups % size == 0 or size % groups == 0)

    if tp < 1 or not legal(tp):
        sizes = ", ".join(str(size) for size in range(1, _MAX_TP + 1) if legal(size))
        raise ConfigError(
            f"tensor parallel size {tp} does not fit a decoder of {text.num_attention_heads} heads, "
            f"{text.num_query_groups} kv heads and ffn {text.ffn_hidden_size}: use one of {sizes}"
        )


def llama_entries(text: TextConfig, prefix: str = "model.", head: str = "lm_head.weight") -> list[Entry]:
    """Weight map of a decoder whose HF names are those of Llama, Mistral, Qwen2, Qwen3 and Gemma 3.

    Args:
        text: the decoder.
        prefix: of the HF names of all but the head.
        head: HF name of the head; unused where it is tied.
    """
    mg, norms = "language_model.", [("pre_mlp_layernorm", "post_attention_layernorm")]
    if text.gemma:
        norms = [
            ("self_attn_bda", norms[0][1]),
            ("pre_mlp_layernorm", "pre_feedforward_layernorm"),
            ("mlp_bda", "post_feedforward_layernorm"),
        ]
    entries = [direct(mg + "embedding.word_embeddings.weight", prefix + "embed_tokens.weight", VOCAB)]
    for i in range(text.num_layers):
        h, m = f"{prefix}layers.{i}.", f"{mg}decoder.layers.{i}."
        entries.append(direct(m + "input_layernorm.weight", h + "input_layernorm.weight"))
        entries += [
            qkv(
                f"{m}self_attention.linear_qkv.{kind}",
                [f"{h}self_attn.{x}_proj.{kind}" for x in "qkv"],
                num_heads=text.num_attention_heads,
                num_query_groups=text.num_query_groups,
            )
            for kind in (("weight", "bias") if text.qkv_bias else ("weight",))
        ]
        if text.qk_norm:
            entries += [
                direct(f"{m}self_attention.{x}_layernorm.weight", f"{h}self_attn.{x}_norm.weight") for x in "qk"
            ]
        entries += [
            direct(m + "self_attention.linear_proj.weight", h + "self_attn.o_proj.weight", ROW),
            *(direct(f"{m}{own}.weight", f"{h}{name}.weight") for own, name in norms),
            gated(m + "mlp.linear_fc1.weight", [h + "mlp.gate_proj.weight", h + "mlp.up_proj.weight"]),
            direct(m + "mlp.linear_fc2.weight", h + "mlp.down_proj.weight", ROW),
        ]
    entries.append(direct(mg + "decoder.final_layernorm.weight", prefix + "norm.weight"))
    if not text.tie_word_embeddings:
        entries.append(direct(mg + "output_layer.weight", head, VOCAB))
    return entries
