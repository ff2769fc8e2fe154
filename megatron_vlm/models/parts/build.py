"""Builds towers and connectors over tensor parallel ranks, for any family: what each part's config describes.

Part configs are read where nothing is built (processors in worker processes, conversion): this file alone imports megatron-core.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_vlm.layers.backend import backend_of
from megatron_vlm.layers.perceiver import PerceiverAttention, PerceiverLayer, PerceiverResampler
from megatron_vlm.layers.projector import LinearProjector, PooledProjector, Projector
from megatron_vlm.layers.solo import SoloGroup
from megatron_vlm.layers.vision import internvit
from megatron_vlm.layers.vision.clip import ClipVisionModel, quick_gelu
from megatron_vlm.layers.vision.encoder import Encoder
from megatron_vlm.layers.vision.internvit import InternVisionModel
from megatron_vlm.layers.vision.qwen_vit import DeepStackMerger, PatchMerger, QwenVisionModel, WindowLayer
from megatron_vlm.layers.vision.siglip import SiglipVisionModel
from megatron_vlm.models.language import gelu_tanh, layer_spec, process_groups, transformer_config
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.parts.clip import ClipConfig
from megatron_vlm.models.parts.internvit import InternVitConfig
from megatron_vlm.models.parts.perceiver import PerceiverConfig
from megatron_vlm.models.parts.qwen_vit import Qwen3VitConfig, Qwen25VitConfig, QwenVitConfig
from megatron_vlm.models.parts.siglip import SiglipConfig
from megatron_vlm.models.parts.tower import TowerConfig
from megatron_vlm.parallel.topology import Topology

P = TypeVar("P", bound=Projector)


def build_encoder(
    tower: TowerConfig,
    topology: Topology,
    options: ModelOptions,
    activation: Callable[[Tensor], Tensor],
    *,
    final_norm: bool = False,
    layer: Callable[[int, TransformerConfig, Any], ModuleSpec] | None = None,
) -> Encoder:
    """The tower's bidirectional layers; whole on every rank where its heads do not divide.

    Args:
        tower, topology, options: of the model.
        activation: of the MLPs.
        final_norm: a norm follows the last layer.
        layer: ``layer(index, config, tensor parallel group)``, where the layers are not plain ones.
    """
    solo = topology.whole_tower or not tower.sharded(topology.tp)
    groups = process_groups(solo)
    mcore = transformer_config(
        topology,
        options,
        decoder=False,
        tp=1 if solo else None,
        num_layers=tower.num_layers,
        hidden_size=tower.hidden_size,
        ffn_hidden_size=tower.ffn_hidden_size,
        num_attention_heads=tower.num_attention_heads,
        normalization=tower.normalization,
        layernorm_epsilon=tower.norm_epsilon,
        activation_func=activation,
        gated_linear_unit=tower.gated_mlp,
        add_bias_linear=True,
    )
    setattr(mcore, "head_multiple", options.vision_head_multiple)  # noqa: B010 - for core attention
    plain = layer_spec(mcore, causal=False)
    layers = [layer(i, mcore, groups.tp) if layer else plain for i in range(tower.num_layers)]
    spec = TransformerBlockSubmodules(layer_specs=layers, layer_norm=backend_of(mcore).norm(mcore))
    return Encoder(mcore, spec, post_layer_norm=final_norm, pg_collection=groups)


def build_clip(
    clip: ClipConfig, topology: Topology, options: ModelOptions, tower: type[ClipVisionModel] | None = None
) -> ClipVisionModel:
    """The tower (of a subclass ``tower``, if given); whole on every rank where its heads do not divide."""
    activations: dict[str, Callable[[Tensor], Tensor]] = {
        "quick_gelu": quick_gelu,
        "gelu": F.gelu,
        "gelu_pytorch_tanh": gelu_tanh,
    }
    encoder = build_encoder(clip, topology, options, activations[clip.hidden_act])
    return (tower or ClipVisionModel)(
        encoder,
        num_run_layers=clip.num_run_layers,
        config=encoder.config,
        patch_size=clip.patch_size,
        num_channels=clip.num_channels,
        side=clip.side,
        siglip=clip.siglip,
    )


def build_siglip(
    siglip: SiglipConfig, topology: Topology, options: ModelOptions, *, smallest: int = 1, stretched: bool = True
) -> SiglipVisionModel:
    """The tower, with the norm after its last layer; arguments as of ``build_internvit`` and ``SiglipVisionModel``."""
    encoder = build_encoder(siglip, topology, options, gelu_tanh, final_norm=True)
    return SiglipVisionModel(
        encoder,
        hidden_size=siglip.hidden_size,
        patch_size=siglip.patch_size,
        num_channels=siglip.num_channels,
        side=siglip.side,
        smallest=smallest,
        stretched=stretched,
        dtype=options.torch_dtype,
        device=next(encoder.parameters()).device,
    )


def build_internvit(
    vit: InternVitConfig, topology: Topology, options: ModelOptions, *, smallest: int = 1
) -> InternVisionModel:
    """The tower; whole on every rank where its heads do not divide. ``smallest``: side of the connector's blocks of patches."""
    last = max(1, vit.num_layers - 1)

    def layer(index: int, mcore: TransformerConfig, tp_group: Any) -> ModuleSpec:
        return _internvit_layer(vit, mcore, tp_group, options.drop_path_rate * index / last)

    encoder = build_encoder(vit, topology, options, F.gelu, layer=layer)
    return InternVisionModel(
        encoder,
        hidden_size=vit.hidden_size,
        patch_size=vit.patch_size,
        num_channels=vit.num_channels,
        side=vit.side,
        smallest=smallest,
        dtype=options.torch_dtype,
        device=next(encoder.parameters()).device,
    )


def build_qwen25_vit(vit: Qwen25VitConfig, topology: Topology, options: ModelOptions) -> QwenVisionModel:
    """The tower; whole on every rank where its heads do not divide."""

    def layer(index: int, mcore: TransformerConfig, tp_group: Any) -> ModuleSpec:
        return layer_spec(mcore, causal=False, layer=None if index in vit.full_layers else ModuleSpec(WindowLayer))

    encoder = build_encoder(vit, topology, options, F.silu, layer=layer)
    return _qwen_vit(vit, encoder, options, window=vit.window)


def build_qwen3_vit(vit: Qwen3VitConfig, topology: Topology, options: ModelOptions) -> QwenVisionModel:
    """The same."""
    encoder = build_encoder(vit, topology, options, gelu_tanh)
    return _qwen_vit(vit, encoder, options, window=None, bias=True, side=vit.side, levels=vit.levels)


def _qwen_vit(vit: QwenVitConfig, encoder: Encoder, options: ModelOptions, **own: Any) -> QwenVisionModel:
    return QwenVisionModel(
        encoder,
        hidden_size=vit.hidden_size,
        patch_size=vit.patch_size,
        temporal_patch_size=vit.temporal_patch_size,
        num_channels=vit.num_channels,
        block=vit.block,
        rotary_base=vit.rotary_base,
        dtype=options.torch_dtype,
        device=next(encoder.parameters()).device,
        **own,
    )


def build_patch_merger(vit: QwenVitConfig, hidden_size: int, topology: Topology, options: ModelOptions) -> PatchMerger:
    """The mergers to the decoder's ``hidden_size``, split by the width between their linears."""
    mcore, norm = _projector_config(hidden_size, topology, options), (vit.normalization, vit.norm_epsilon)
    arguments = mcore, vit.hidden_size, vit.block**2, topology.tower_group, norm
    levels = vit.num_mergers - 1
    return DeepStackMerger(levels, *arguments) if levels else PatchMerger(*arguments)


def _internvit_layer(vit: InternVitConfig, mcore: TransformerConfig, tp_group: Any, drop_path: float) -> ModuleSpec:
    spec = layer_spec(mcore, causal=False)
    attention = spec.submodules.self_attention
    linears = {} if vit.qkv_bias else {"linear_qkv": backend_of(mcore).unbiased_column}
    norm = ModuleSpec(internvit.WidthRMSNorm, params={"tp_group": tp_group})
    norms = {"q_layernorm": norm, "k_layernorm": norm} if vit.qk_norm else {}
    residual = ModuleSpec(internvit.ScaledResidual, params={"config": mcore, "drop_path": drop_path})
    return ModuleSpec(
        internvit.InternVitLayer,
        submodules=dataclasses.replace(
            spec.submodules,
            self_attention=dataclasses.replace(
                attention, submodules=dataclasses.replace(attention.submodules, **linears, **norms)
            ),
            self_attn_bda=residual,
            mlp_bda=residual,
        ),
    )


def perceiver_transformer_config(
    perceiver: PerceiverConfig, hidden_size: int, topology: Topology, options: ModelOptions
) -> TransformerConfig:
    """megatron-core's config of the resampler, which serves a gated projection before it as well."""
    # num_query_groups is checked against tp by megatron-core's config only for its own attention, which this part does not use.
    return transformer_config(
        topology,
        options,
        decoder=False,
        tp=1,
        num_layers=perceiver.depth,
        hidden_size=hidden_size,
        ffn_hidden_size=4 * hidden_size,
        num_attention_heads=perceiver.num_attention_heads,
        num_query_groups=perceiver.num_query_groups,
        kv_channels=perceiver.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=perceiver.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
    )


def build_perceiver(perceiver: PerceiverConfig, mcore: TransformerConfig, topology: Topology) -> PerceiverResampler:
    """The resampler; its attention whole on every rank where its heads do not divide."""
    group = topology.tower_group if perceiver.sharded(topology.tp) else SoloGroup()
    layers = [
        PerceiverLayer(mcore, PerceiverAttention(mcore, group), topology.tower_group) for _ in range(perceiver.depth)
    ]
    return PerceiverResampler(mcore, layers, perceiver.num_latents)


def build_projector(
    kind: Callable[..., P],
    width: int,
    hidden_size: int,
    topology: Topology,
    options: ModelOptions,
    norm_epsilon: float | None = None,
) -> P:
    """The projector, split by the width between its linears.

    Args:
        kind: class to make, or what makes one of the same arguments.
        width: of the features.
        hidden_size: of the decoder.
        topology, options: of the model.
        norm_epsilon: of the norm before it; None: there is none.
    """
    return kind(_projector_config(hidden_size, topology, options), width, topology.tower_group, norm_epsilon)


def build_linear_projector(width: int, hidden_size: int, topology: Topology, options: ModelOptions) -> LinearProjector:
    """The projector of one linear; arguments as of ``build_projector``."""
    return LinearProjector(_projector_config(hidden_size, topology, options), width, topology.tower_group)


def build_pooled_projector(
    width: int, hidden_size: int, norm_epsilon: float, pool: int, topology: Topology, options: ModelOptions
) -> PooledProjector:
    """Gemma 3's connector, whose norm's weight is 1 apart; arguments as of ``PooledProjector``."""
    zero_centered = dict(normalization="RMSNorm", layernorm_zero_centered_gamma=True)
    return PooledProjector(
        _projector_config(hidden_size, topology, options, **zero_centered), width, norm_epsilon, pool
    )


def _projector_config(hidden_size: int, topology: Topology, options: ModelOptions, **fields: Any) -> TransformerConfig:
    """megatron-core's config of a connector of linears with biases and GELU between them."""
    return transformer_config(
        topology,
        options,
        decoder=False,
        tp=1,
        num_layers=1,
        hidden_size=hidden_size,
        num_attention_heads=1,
        activation_func=F.gelu,
        add_bias_linear=True,
        **fields,
    )
