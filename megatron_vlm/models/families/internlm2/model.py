"""Builds InternLM2's stages: a decoder alone."""

from megatron_vlm.models.families.internlm2.config import InternLM2ModelConfig
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.vlm import VisionLanguageModel, build_stage
from megatron_vlm.parallel.topology import Topology


def build_internlm2(
    config: InternLM2ModelConfig, topology: Topology, options: ModelOptions, *, vp_stage: int | None = None
) -> VisionLanguageModel:
    """Builds one stage."""
    return build_stage(config.text, topology, options, vp_stage)
