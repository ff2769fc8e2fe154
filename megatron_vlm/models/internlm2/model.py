"""Builds InternLM2's stages: a decoder alone."""

from typing import Any

from megatron_vlm.models.internlm2.config import InternLM2ModelConfig
from megatron_vlm.models.language import Decoder
from megatron_vlm.models.vlm import VisionLanguageModel, stage_ends
from megatron_vlm.parallel.topology import Topology


def build_internlm2(
    config: InternLM2ModelConfig, topology: Topology, options: Any, *, vp_stage: int | None = None
) -> VisionLanguageModel:
    """Builds one stage."""
    pre, post = stage_ends(topology, vp_stage)
    return VisionLanguageModel(Decoder(config.text, topology, options, vp_stage, pre, post), None, None)
