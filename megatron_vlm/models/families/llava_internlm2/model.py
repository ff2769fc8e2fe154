"""Builds LLaVA's stages: CLIP tower, two-layer MLP, and a decoder of Llama's shape (InternLM2, Vicuna, Llama).

pixels --ClipVisionModel: hidden state of one layer, without CLS--> [P, Hv] --linear, GELU, linear--> [P, H]
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from megatron_vlm.layers.projector import Projector
from megatron_vlm.models.families.llava_internlm2.config import LlavaModelConfig
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.parts.build import build_clip, build_projector
from megatron_vlm.models.vlm import VisionLanguageModel, build_stage
from megatron_vlm.parallel.topology import Topology


class LlavaConnector(Projector):
    """The projector: every patch becomes a token."""

    def forward(self, patches: Tensor, counts: Sequence[int]) -> Tensor:  # type: ignore[override]
        """patches [P, Hv] with ``counts`` per image -> features [P, H]."""
        return super().forward(patches)


def build_llava(
    config: LlavaModelConfig, topology: Topology, options: ModelOptions, *, vp_stage: int | None = None
) -> VisionLanguageModel:
    """Builds one stage; only the first owns tower and connector."""
    tower = partial(build_clip, config.vision)
    connector = partial(build_projector, LlavaConnector, config.vision.hidden_size, config.text.hidden_size)
    return build_stage(config.text, topology, options, vp_stage, tower, connector)
