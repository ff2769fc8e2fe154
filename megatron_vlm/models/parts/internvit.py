"""InternViT for any family: its config from either spelling, how it is built over tensor parallel ranks, its weight map.

Checkpoints spell it in two ways: ``chat``, the original's, and ``hf``, transformers'.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.hf_config import require
from megatron_vlm.models.parts.tower import BOTH, LayerNames, TowerConfig, layer_entries, tower_sizes
from megatron_vlm.weights.mapping import COLUMN, REPLICATED, Entry, direct

# Defaults of the original's InternVisionConfig, for keys that a config.json leaves out.
_CHAT_DEFAULTS = {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": False,
    "qk_normalization": True,
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
}


@dataclass(frozen=True, kw_only=True)
class InternVitConfig(TowerConfig):
    """InternViT.

    Attributes:
        norm_type: of the norms before attention and MLP.
        qkv_bias: queries, keys and values have biases.
        qk_norm: queries and keys are RMS-normed over all heads together.
    """

    norm_type: Literal["layer_norm", "rms_norm"]
    qkv_bias: bool
    qk_norm: bool

    @property
    def normalization(self) -> str:
        return "LayerNorm" if self.norm_type == "layer_norm" else "RMSNorm"

    @classmethod
    def from_chat(cls, vision: Mapping[str, Any]) -> "InternVitConfig":
        """Reads the original's config.

        Raises:
            ConfigError: a feature that is not built.
        """
        values = {**_CHAT_DEFAULTS, **vision}
        return cls._of(values, bool(values["qkv_bias"]), bool(values["qk_normalization"]))

    @classmethod
    def from_hf(cls, vision: Mapping[str, Any]) -> "InternVitConfig":
        """Reads transformers' config, with every default filled in.

        Raises:
            ConfigError: a feature that is not built.
        """
        for name, wanted in (
            ("use_mask_token", False), ("use_absolute_position_embeddings", True), ("use_mean_pooling", True),
        ):  # fmt: skip
            require(f"vision_config.{name}", vision[name], wanted, "InternVL3")
        sizes = {name: vision[name] for name in ("image_size", "patch_size")}
        for name, (height, width) in sizes.items():
            if height != width:
                raise ConfigError(f"vision_config.{name} {height} x {width} is not square, which is not built")
        values = {**vision, **{name: size[0] for name, size in sizes.items()}}
        return cls._of(values, vision["attention_bias"], vision["use_qk_norm"])

    def to_native(self) -> dict[str, Any]:
        """As transformers' config has it."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_attention_heads,
            "image_size": [self.image_size, self.image_size],
            "patch_size": [self.patch_size, self.patch_size],
            "num_channels": self.num_channels,
            "norm_type": self.norm_type,
            "layer_norm_eps": self.norm_epsilon,
            "attention_bias": self.qkv_bias,
            "use_qk_norm": self.qk_norm,
        }

    @classmethod
    def _of(cls, values: Mapping[str, Any], qkv_bias: bool, qk_norm: bool) -> "InternVitConfig":
        require("vision_config.hidden_act", values["hidden_act"], "gelu", "InternVL3")
        return cls(**tower_sizes(values), norm_type=values["norm_type"], qkv_bias=qkv_bias, qk_norm=qk_norm)


@dataclass(frozen=True, kw_only=True)
class _Names:
    """HF names of the tower in one spelling; those of a layer stand behind ``layers`` and its number."""

    class_embedding: str
    patch_embedding: str
    position_embedding: str
    layers: str
    scales: tuple[str, str]
    qk_norms: tuple[str, str]
    layer: LayerNames


_NAMES = {
    "chat": _Names(
        class_embedding="embeddings.class_embedding",
        patch_embedding="embeddings.patch_embedding",
        position_embedding="embeddings.position_embedding",
        layers="encoder.layers.",
        scales=("ls1", "ls2"),
        qk_norms=("attn.q_norm", "attn.k_norm"),
        layer=LayerNames(norms=("norm1", "norm2"), qkv=("attn.qkv",), projection="attn.proj"),
    ),
    "hf": _Names(
        class_embedding="embeddings.cls_token",
        patch_embedding="embeddings.patch_embeddings.projection",
        position_embedding="embeddings.position_embeddings",
        layers="encoder.layer.",
        scales=("lambda_1", "lambda_2"),
        qk_norms=("attention.q_norm", "attention.k_norm"),
        layer=LayerNames(
            norms=("layernorm_before", "layernorm_after"),
            qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            projection="attention.projection_layer",
        ),
    ),
}


def internvit_entries(vit: InternVitConfig, tp: int, naming: Literal["chat", "hf"], hf: str) -> list[Entry]:
    """The tower's part of a weight map.

    Args:
        vit: the tower.
        tp: tensor parallel size, which decides whether it runs replicated.
        naming: spelling of the HF names, and ``hf``, what stands before them.
    """
    mg, names, column = "vision_model.", _NAMES[naming], COLUMN if vit.sharded(tp) else REPLICATED
    norm_kinds = BOTH if vit.norm_type == "layer_norm" else BOTH[:1]
    entries = [
        direct(mg + "class_embedding", hf + names.class_embedding),
        direct(mg + "position_embedding", hf + names.position_embedding),
        *(direct(f"{mg}patch_embedding.{kind}", f"{hf}{names.patch_embedding}.{kind}") for kind in BOTH),
    ]
    for i in range(vit.num_layers):
        h, m = f"{hf}{names.layers}{i}.", f"{mg}encoder.layers.{i}."
        entries += layer_entries(vit, tp, h, m, names.layer, norm_kinds, BOTH if vit.qkv_bias else BOTH[:1])
        residuals = zip(("self_attn_bda", "mlp_bda"), names.scales)
        entries += [direct(f"{m}{own}.scale", f"{h}{name}") for own, name in residuals]
        if vit.qk_norm:
            for own, name in zip(("q_layernorm", "k_layernorm"), names.qk_norms):
                entries.append(direct(f"{m}self_attention.{own}.weight", f"{h}{name}.weight", column))
    return entries
