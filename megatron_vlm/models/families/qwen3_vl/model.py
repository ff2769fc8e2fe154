"""Builds Qwen3-VL's stages: the tower with learned positions, its mergers, a Qwen3 decoder with three positions a token.

    pixels --QwenVisionModel--> [P, (1 + n) Hv], block by block --DeepStackMerger--> [F, (1 + n) H]

Legend: n levels, which layers/deepstack.py adds behind the decoder's first layers. The tower is split over tensor parallel ranks;
where its heads do not divide it runs whole on every rank.
"""

from functools import partial

from megatron_vlm.models.families.qwen3_vl.config import Qwen3VLConfig
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.parts.build import build_patch_merger, build_qwen3_vit
from megatron_vlm.models.vlm import VisionLanguageModel, build_stage
from megatron_vlm.parallel.topology import Topology


def build_qwen3_vl(
    config: Qwen3VLConfig, topology: Topology, options: ModelOptions, *, vp_stage: int | None = None
) -> VisionLanguageModel:
    """Builds one stage; only the first owns tower and mergers."""
    tower = partial(build_qwen3_vit, config.vision)
    connector = partial(build_patch_merger, config.vision, config.text.hidden_size)
    return build_stage(config.text, topology, options, vp_stage, tower, connector)
