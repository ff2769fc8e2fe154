"""Builds InternVL3's stages: InternViT, pixel shuffle and MLP connector, Qwen2.5 decoder.

    pixels --InternVisionModel--> [P, Hv] --pixel shuffle--> [F, 4 Hv] --norm, linear, GELU, linear--> [F, H]

The tower is split over tensor parallel ranks; where its heads do not divide it runs whole on every rank.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor

from megatron_vlm.layers.norm import LayerNorm, RMSNorm
from megatron_vlm.layers.projector import Projector
from megatron_vlm.layers.vision.internvit import (
    InternVisionModel,
    InternVitLayer,
    ScaledResidual,
    WidthRMSNorm,
    pixel_shuffle,
)
from megatron_vlm.models.internvl3.config import InternVL3ModelConfig
from megatron_vlm.models.language import Decoder, layer_spec, process_groups, transformer_config
from megatron_vlm.models.vlm import VisionLanguageModel, stage_ends
from megatron_vlm.parallel.topology import Topology

_NORM_EPSILON = 1e-5  # of the connector: both implementations take torch's default
_NORMS: dict[str, type] = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}


class InternVL3Connector(Projector):
    """Pixel shuffle and projector."""

    shuffle: int

    def forward(self, patches: Tensor, counts: Sequence[int]) -> Tensor:  # type: ignore[override]
        """patches [P, Hv] with ``counts`` per tile -> features [F, H]."""
        return super().forward(pixel_shuffle(patches, len(counts), self.shuffle))


class UnbiasedColumnParallelLinear(ColumnParallelLinear):
    """Without the bias that megatron-core's attention gives its linears all or none of."""

    def __init__(self, *args: Any, bias: bool = False, **kwargs: Any):
        super().__init__(*args, bias=False, **kwargs)


def build_internvl3(
    config: InternVL3ModelConfig, topology: Topology, options: Any, *, vp_stage: int | None = None
) -> VisionLanguageModel:
    """Builds one stage; only the first owns tower and connector."""
    pre, post = stage_ends(topology, vp_stage)
    return VisionLanguageModel(
        Decoder(config.text, topology, options, vp_stage, pre, post),
        build_internvit(config, topology, options) if pre else None,
        build_connector(config, topology, options) if pre else None,
        recompute_connector=options.recompute_granularity is not None,
    )


def build_internvit(config: InternVL3ModelConfig, topology: Topology, options: Any) -> InternVisionModel:
    """The tower; whole on every rank where its heads do not divide."""
    vision = config.vision
    solo = not config.vision_sharded(topology.tp)
    groups = process_groups(solo)
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
        activation_func=F.gelu,
        add_bias_linear=True,
    )
    last = max(1, vision.num_layers - 1)
    layers = [_layer(config, mcore, groups.tp, options.drop_path_rate * i / last) for i in range(vision.num_layers)]
    spec = TransformerBlockSubmodules(layer_specs=layers, layer_norm=LayerNorm)
    encoder = TransformerBlock(mcore, spec, post_layer_norm=False, pg_collection=groups)
    return InternVisionModel(
        encoder,
        hidden_size=vision.hidden_size,
        patch_size=vision.patch_size,
        num_channels=vision.num_channels,
        side=vision.side,
        dtype=options.torch_dtype,
        device=next(encoder.parameters()).device,
    )


def build_connector(config: InternVL3ModelConfig, topology: Topology, options: Any) -> InternVL3Connector:
    """The projector, split by the width between its linears."""
    text = config.text
    mcore = transformer_config(
        topology,
        options,
        decoder=False,
        tp=1,
        num_layers=1,
        hidden_size=text.hidden_size,
        num_attention_heads=1,
        activation_func=F.gelu,
        add_bias_linear=True,
    )
    width = config.vision.hidden_size * config.shuffle**2
    connector = InternVL3Connector(mcore, width, topology.tp_group, _NORM_EPSILON)
    connector.shuffle = config.shuffle
    return connector


def _layer(config: InternVL3ModelConfig, mcore: Any, tp_group: Any, drop_path: float) -> ModuleSpec:
    vision = config.vision
    spec = layer_spec(_NORMS[vision.norm_type], causal=False)
    attention = spec.submodules.self_attention
    linears = {} if vision.qkv_bias else {"linear_qkv": UnbiasedColumnParallelLinear}
    norm = ModuleSpec(WidthRMSNorm, params={"tp_group": tp_group})
    norms = {"q_layernorm": norm, "k_layernorm": norm} if vision.qk_norm else {}
    residual = ModuleSpec(ScaledResidual, params={"config": mcore, "drop_path": drop_path})
    return ModuleSpec(
        InternVitLayer,
        submodules=dataclasses.replace(
            spec.submodules,
            self_attention=dataclasses.replace(
                attention, submodules=dataclasses.replace(attention.submodules, **linears, **norms)
            ),
            self_attn_bda=residual,
            mlp_bda=residual,
        ),
    )
