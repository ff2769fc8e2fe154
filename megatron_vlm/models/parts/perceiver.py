"""The perceiver resampler for any family: its config and cost, how it is built over tensor parallel ranks, its weight map."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.models.hf_config import require
from megatron_vlm.weights.mapping import COLUMN, REPLICATED, ROW, Entry, direct, gated


@dataclass(frozen=True, kw_only=True)
class PerceiverConfig(Config):
    """The perceiver resampler; it is as wide as the decoder, its MLPs four times that."""

    num_latents: int
    depth: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    norm_epsilon: float

    def sharded(self, tp: int) -> bool:
        """Its attention is split over ``tp`` ranks (else it runs whole on each)."""
        heads, groups, width = self.num_attention_heads, self.num_query_groups, self.head_dim
        return heads % tp == 0 and (groups % tp == 0 or tp % groups == 0) and groups * width % tp == 0

    def flops(self, patches: int, hidden: int) -> int:
        """Operations for one image, of width ``hidden``."""
        n, keys = self.num_latents, patches + self.num_latents
        q, kv = self.num_attention_heads * self.head_dim, self.num_query_groups * self.head_dim
        # Queries and output; keys and values; scores and their product with the values; gated MLP.
        return self.depth * (4 * n * hidden * q + 4 * keys * hidden * kv + 4 * n * keys * q + 24 * n * hidden**2)

    @classmethod
    def from_hf(cls, perceiver: Mapping[str, Any]) -> "PerceiverConfig":
        """Reads the ``perceiver_config`` of a model, with every default filled in.

        Raises:
            ConfigError: a feature that is not built.
        """
        require("perceiver_config.hidden_act", perceiver["hidden_act"], "silu")
        return cls(
            num_latents=perceiver["resampler_n_latents"],
            depth=perceiver["resampler_depth"],
            num_attention_heads=perceiver["resampler_n_heads"],
            num_query_groups=perceiver["num_key_value_heads"],
            head_dim=perceiver["resampler_head_dim"],
            norm_epsilon=perceiver["rms_norm_eps"],
        )


def perceiver_entries(perceiver: PerceiverConfig, tp: int, hf: str, mg: str) -> list[Entry]:
    """The resampler's part of a weight map.

    Args:
        perceiver: the resampler.
        tp: tensor parallel size, which decides whether its attention runs replicated.
        hf, mg: prefixes of the HF names and of ours.
    """
    column, row = (COLUMN, ROW) if perceiver.sharded(tp) else (REPLICATED, REPLICATED)
    entries = [direct(mg + "latents", hf + "latents")]
    for i in range(perceiver.depth):
        h, m = f"{hf}layers.{i}.", f"{mg}layers.{i}."
        for norm in ("input_latents_norm", "input_context_norm", "post_attention_layernorm"):
            entries.append(direct(f"{m}{norm}.weight", f"{h}{norm}.weight"))
        for proj in ("q_proj", "k_proj", "v_proj"):
            entries.append(direct(f"{m}self_attn.{proj}.weight", f"{h}self_attn.{proj}.weight", column))
        entries.append(direct(f"{m}self_attn.o_proj.weight", f"{h}self_attn.o_proj.weight", row))
        entries.append(gated(f"{m}mlp.linear_fc1.weight", [f"{h}mlp.gate_proj.weight", f"{h}mlp.up_proj.weight"]))
        entries.append(direct(f"{m}mlp.linear_fc2.weight", f"{h}mlp.down_proj.weight", ROW))
    entries.append(direct(mg + "norm.weight", hf + "norm.weight"))
    return entries
