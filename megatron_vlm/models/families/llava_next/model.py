"""Builds the stages of LLaVA-NeXT and LLaVA-OneVision: CLIP or SigLIP over views of an image, two-layer MLP, decoder.

    pixels [C, views * S, S] --each view: hidden state of one layer--> [P, Hv] --linear, GELU, linear--> [P, H] --lines--> [F, H]

Lines: ``layers/vision/anyres.py``. Semantics: transformers 5.23, models/llava_next and models/llava_onevision.
"""

from functools import partial

from megatron_vlm.layers.vision.anyres import AnyResClipVisionModel, AnyResConnector
from megatron_vlm.models.families.llava_next.config import LlavaNextModelConfig
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.parts.build import build_clip, build_projector
from megatron_vlm.models.vlm import VisionLanguageModel, build_stage
from megatron_vlm.parallel.topology import Topology


def build_llava_next(
    config: LlavaNextModelConfig, topology: Topology, options: ModelOptions, *, vp_stage: int | None = None
) -> VisionLanguageModel:
    """Builds one stage; only the first owns tower and connector."""
    tower = partial(build_clip, config.vision, tower=AnyResClipVisionModel)
    kind = partial(AnyResConnector, config.anyres)
    connector = partial(build_projector, kind, config.vision.hidden_size, config.text.hidden_size)
    return build_stage(config.text, topology, options, vp_stage, tower, connector)
