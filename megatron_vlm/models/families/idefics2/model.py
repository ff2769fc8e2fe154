"""Builds Idefics2's stages: SigLIP NaViT tower, modality projection, perceiver resampler, Mistral or Llama decoder.

    pixels --SiglipVisionModel--> [P, Hv] --modality_projection--> [P, H] --perceiver_resampler--> [I * L, H]

Tower and resampler are split over tensor parallel ranks; where their heads do not divide they run whole on every rank.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from megatron_vlm.layers.mlp import ParallelMLP
from megatron_vlm.models.families.idefics2.config import Idefics2ModelConfig
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.parts.build import build_perceiver, build_siglip, perceiver_transformer_config
from megatron_vlm.models.vlm import VisionLanguageModel, build_stage
from megatron_vlm.parallel.topology import Topology


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
    config: Idefics2ModelConfig, topology: Topology, options: ModelOptions, *, vp_stage: int | None = None
) -> VisionLanguageModel:
    """Builds one stage; only the first owns tower and connector."""
    tower, connector = partial(build_siglip, config.vision), partial(_build_connector, config)
    return build_stage(config.text, topology, options, vp_stage, tower, connector)


def _build_connector(config: Idefics2ModelConfig, topology: Topology, options: ModelOptions) -> Idefics2Connector:
    """Modality projection (split by its ffn) and resampler (attention whole on every rank where its heads do not divide)."""
    text = config.text
    mcore = perceiver_transformer_config(config.perceiver, text.hidden_size, topology, options)
    return Idefics2Connector(
        ParallelMLP(mcore, config.vision.hidden_size, text.ffn_hidden_size, topology.tower_group),
        build_perceiver(config.perceiver, mcore, topology),
    )
