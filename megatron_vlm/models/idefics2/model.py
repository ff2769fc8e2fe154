"""Builds Idefics2's stages: SigLIP NaViT tower, modality projection, perceiver resampler, Mistral or Llama decoder.

    pixels --SiglipVisionModel--> [P, Hv] --modality_projection--> [P, H] --perceiver_resampler--> [I * L, H]

Tower and resampler are split over tensor parallel ranks; where their heads do not divide they run whole on every rank.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor, nn

from megatron_vlm.layers.mlp import ParallelMLP
from megatron_vlm.layers.norm import LayerNorm
from megatron_vlm.layers.perceiver import PerceiverAttention, PerceiverLayer, PerceiverResampler
from megatron_vlm.layers.vision.siglip import SiglipVisionModel
from megatron_vlm.models.idefics2.config import Idefics2ModelConfig
from megatron_vlm.models.language import (
    Decoder,
    gelu_tanh,
    layer_spec,
    process_groups,
    transformer_config,
)
from megatron_vlm.models.vlm import VisionLanguageModel, stage_ends
from megatron_vlm.parallel.topology import SoloGroup, Topology


class Idefics2Connector(nn.Module):
    """Modality projection and perceiver resampler."""

    def __init__(self, modality_projection: nn.Module, perceiver_resampler: nn.Module):
        super().__init__()
        self.modality_projection = modality_projection
        self.perceiver_resampler = perceiver_resampler

    def forward(self, patches: Tensor, counts: Sequence[int]) -> Tensor:
        """patches [P, Hv] with ``counts`` per image -> features [I * L, H]."""
        return self.perceiver_resampler(self.modality_projection(patches), counts)


def build_idefics2(
    config: Idefics2ModelConfig, topology: Topology, options: Any, *, vp_stage: int | None = None
) -> VisionLanguageModel:
    """Builds one stage; only the first owns tower and connector."""
    pre, post = stage_ends(topology, vp_stage)
    decoder = Decoder(config.text, topology, options, vp_stage, pre, post)
    return VisionLanguageModel(
        decoder,
        build_siglip(config, topology, options) if pre else None,
        build_connector(config, topology, options) if pre else None,
        recompute_connector=options.recompute_granularity is not None,
    )


def build_siglip(config: Idefics2ModelConfig, topology: Topology, options: Any) -> SiglipVisionModel:
    """The tower; whole on every rank where its heads do not divide."""
    vision = config.vision
    solo = not config.vision_sharded(topology.tp)
    mcore = transformer_config(
        topology,
        options,
        decoder=False,
        tp=1 if solo else None,
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_attention_heads,
        normalization="LayerNorm",
        layernorm_epsilon=vision.norm_epsilon,
        activation_func=gelu_tanh,
        add_bias_linear=True,
    )
    spec = TransformerBlockSubmodules(
        layer_specs=[layer_spec(LayerNorm, causal=False)] * vision.num_layers, layer_norm=LayerNorm
    )
    encoder = TransformerBlock(mcore, spec, pg_collection=process_groups(solo))
    return SiglipVisionModel(
        encoder,
        hidden_size=vision.hidden_size,
        patch_size=vision.patch_size,
        num_channels=vision.num_channels,
        side=vision.side,
        dtype=options.torch_dtype,
        device=next(encoder.parameters()).device,
    )


def build_connector(config: Idefics2ModelConfig, topology: Topology, options: Any) -> Idefics2Connector:
    """Modality projection (split by its ffn) and resampler (attention whole on every rank where its heads do not divide)."""
    text, perceiver = config.text, config.perceiver
    solo = not config.perceiver_sharded(topology.tp)
    # num_query_groups is checked against tp by megatron-core's config only for its own attention, which this part does not use.
    mcore = transformer_config(
        topology,
        options,
        decoder=False,
        tp=1,
        num_layers=perceiver.depth,
        hidden_size=text.hidden_size,
        ffn_hidden_size=4 * text.hidden_size,
        num_attention_heads=perceiver.num_attention_heads,
        num_query_groups=perceiver.num_query_groups,
        kv_channels=perceiver.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=perceiver.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
    )
    layers = []
    for _ in range(perceiver.depth):
        attention = PerceiverAttention(mcore, SoloGroup() if solo else topology.tp_group)
        layers.append(PerceiverLayer(mcore, attention, topology.tp_group))
    return Idefics2Connector(
        ParallelMLP(mcore, config.vision.hidden_size, text.ffn_hidden_size, topology.tp_group),
        PerceiverResampler(mcore, layers, perceiver.num_latents),
    )
