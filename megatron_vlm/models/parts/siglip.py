"""SigLIP's vision tower over images of any size (NaViT style) for any family: config, build, weight map."""

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vlm.models.hf_config import require
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.parts.tower import BOTH, TowerConfig, build_encoder, layer_entries, tower_sizes
from megatron_vlm.parallel.topology import Topology
from megatron_vlm.weights.mapping import Entry, direct

if typing.TYPE_CHECKING:
    from megatron_vlm.layers.vision.siglip import SiglipVisionModel


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


def build_siglip(siglip: SiglipConfig, topology: Topology, options: ModelOptions) -> "SiglipVisionModel":
    """The tower, with the norm after its last layer; whole on every rank where its heads do not divide."""
    from megatron_vlm.layers.vision.siglip import SiglipVisionModel  # loads megatron-core
    from megatron_vlm.models.language import gelu_tanh  # loads megatron-core

    encoder = build_encoder(siglip, topology, options, gelu_tanh, final_norm=True)
    return SiglipVisionModel(
        encoder,
        hidden_size=siglip.hidden_size,
        patch_size=siglip.patch_size,
        num_channels=siglip.num_channels,
        side=siglip.side,
        dtype=options.torch_dtype,
        device=next(encoder.parameters()).device,
    )


def siglip_entries(siglip: SiglipConfig, tp: int, hf: str, mg: str = "vision_model.") -> list[Entry]:
    """The tower's part of a weight map; arguments as of ``clip_entries``."""
    entries = [direct(f"{mg}patch_embedding.{kind}", f"{hf}embeddings.patch_embedding.{kind}") for kind in BOTH]
    entries.append(direct(mg + "position_embedding.weight", hf + "embeddings.position_embedding.weight"))
    for i in range(siglip.num_layers):
        entries += layer_entries(siglip, tp, f"{hf}encoder.layers.{i}.", f"{mg}encoder.layers.{i}.")
    entries += [direct(f"{mg}encoder.final_layernorm.{kind}", f"{hf}post_layernorm.{kind}") for kind in BOTH]
    return entries
