"""Builds LLaVA's stages: CLIP tower, two-layer MLP, and a decoder of Llama's shape (InternLM2, Vicuna, Llama).

pixels --ClipVisionModel: hidden state of one layer, without CLS--> [P, Hv] --linear, GELU, linear--> [P, H]
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from megatron_vlm.layers.projector import Projector
from megatron_vlm.models.clip import build_clip
from megatron_vlm.models.language import Decoder, transformer_config
from megatron_vlm.models.llava_internlm2.config import LlavaModelConfig
from megatron_vlm.models.vlm import VisionLanguageModel, stage_ends
from megatron_vlm.parallel.topology import Topology


class LlavaConnector(Projector):
    """The projector: every patch becomes a token."""

    def forward(self, patches: Tensor, counts: Sequence[int]) -> Tensor:  # type: ignore[override]
        """patches [P, Hv] with ``counts`` per image -> features [P, H]."""
        return super().forward(patches)


def build_llava(
    config: LlavaModelConfig, topology: Topology, options: Any, *, vp_stage: int | None = None
) -> VisionLanguageModel:
    """Builds one stage; only the first owns tower and connector."""
    pre, post = stage_ends(topology, vp_stage)
    return VisionLanguageModel(
        Decoder(config.text, topology, options, vp_stage, pre, post),
        build_clip(config.vision, topology, options) if pre else None,
        build_connector(config, topology, options) if pre else None,
        recompute_connector=options.recompute_granularity is not None,
    )


def build_connector(config: LlavaModelConfig, topology: Topology, options: Any) -> LlavaConnector:
    """The projector, split by the width between its linears."""
    mcore = transformer_config(
        topology,
        options,
        decoder=False,
        tp=1,
        num_layers=1,
        hidden_size=config.text.hidden_size,
        num_attention_heads=1,
        activation_func=F.gelu,
        add_bias_linear=True,
    )
    return LlavaConnector(mcore, config.vision.hidden_size, topology.tp_group)
