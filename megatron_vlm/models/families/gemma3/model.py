"""Builds Gemma 3's stages: SigLIP, mean of blocks of patches with norm and matrix, a decoder of local and global layers.

    pixels --SiglipVisionModel--> [P, Hv] --mean of k x k patches--> [F, Hv] --RMSNorm, matrix--> [F, H]

Legend: k side of a block of patches. The tower is split over tensor parallel ranks; where its heads do not divide it runs whole
on every rank, as the connector always does. Semantics: transformers 5.23, models/gemma3/modeling_gemma3.py.
"""

from functools import partial

from megatron_vlm.models.families.gemma3.config import Gemma3ModelConfig
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.parts.build import build_pooled_projector, build_siglip
from megatron_vlm.models.vlm import VisionLanguageModel, build_stage
from megatron_vlm.parallel.topology import Topology


def build_gemma3(
    config: Gemma3ModelConfig, topology: Topology, options: ModelOptions, *, vp_stage: int | None = None
) -> VisionLanguageModel:
    """Builds one stage; only the first owns tower and connector."""
    vision, hidden = config.vision, config.text.hidden_size
    tower = partial(build_siglip, vision, smallest=config.pool, stretched=False)
    connector = partial(build_pooled_projector, vision.hidden_size, hidden, vision.norm_epsilon, config.pool)
    return build_stage(config.text, topology, options, vp_stage, tower, connector)
