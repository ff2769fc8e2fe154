"""Builds Qwen2.5-VL's stages: the tower with windows, the patch merger, a Qwen2.5 decoder with three positions a token.

    pixels --QwenVisionModel--> [P, Hv], block by block --PatchMerger--> [F, H]

The tower is split over tensor parallel ranks; where its heads do not divide it runs whole on every rank.
"""

from functools import partial

from megatron_vlm.models.families.qwen2_5_vl.config import Qwen25VLConfig
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.parts.build import build_patch_merger, build_qwen25_vit
from megatron_vlm.models.vlm import VisionLanguageModel, build_stage
from megatron_vlm.parallel.topology import Topology


def build_qwen2_5_vl(
    config: Qwen25VLConfig, topology: Topology, options: ModelOptions, *, vp_stage: int | None = None
) -> VisionLanguageModel:
    """Builds one stage; only the first owns tower and connector."""
    tower = partial(build_qwen25_vit, config.vision)
    connector = partial(build_patch_merger, config.vision, config.text.hidden_size)
    return build_stage(config.text, topology, options, vp_stage, tower, connector)
