"""SigLIP's vision tower over images of any size (NaViT style) for any family: config, build, weight map."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vlm.models.hf_config import require
from megatron_vlm.models.parts.tower import BOTH, TowerConfig, layer_entries, tower_sizes
from megatron_vlm.weights.mapping import Entry, direct


@dataclass(frozen=True, kw_only=True)
class SiglipConfig(TowerConfig):
    """A SigLIP vision tower."""

    @classmethod
    def from_hf(cls, vision: Mapping[str, Any]) -> "SiglipConfig":
        """Reads the ``vision_config`` of a model, with every default filled in.

        Raises:
            ConfigError: a feature that is not built.
        """
        require("vision_config.hidden_act", vision["hidden_act"], "gelu_pytorch_tanh")
        return cls(**tower_sizes(vision))


def siglip_entries(siglip: SiglipConfig, tp: int, hf: str) -> list[Entry]:
    """The tower's part of a weight map; arguments as of ``clip_entries``."""
    mg = "vision_model."
    entries = [direct(f"{mg}patch_embedding.{kind}", f"{hf}embeddings.patch_embedding.{kind}") for kind in BOTH]
    entries.append(direct(mg + "position_embedding.weight", hf + "embeddings.position_embedding.weight"))
    for i in range(siglip.num_layers):
        entries += layer_entries(siglip, tp, f"{hf}encoder.layers.{i}.", f"{mg}encoder.layers.{i}.")
    entries += [direct(f"{mg}encoder.final_layernorm.{kind}", f"{hf}post_layernorm.{kind}") for kind in BOTH]
    return entries
