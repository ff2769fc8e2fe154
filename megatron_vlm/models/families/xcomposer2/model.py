"""Builds InternLM-XComposer2's stages: CLIP tower, projection, InternLM2 decoder with partial LoRA.

    7b, vl-7b   pixels [3, S, S] --CLIP, all layers--> [n * n, Hv] --projection--> [n * n, H]
    4khd-7b     pixels [3, rows * S, columns * S] --global view and tiles, ``layers/vision/hd.py``--> [F, 4 Hv]
                --projection--> [F, H]

Legend: S size of the tower's images (336), n patches a side, Hv and H hidden sizes of tower and decoder.
"""

from functools import partial

from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_vlm.layers.partial_lora import PartialLoraLayer
from megatron_vlm.layers.projector import Projector
from megatron_vlm.layers.vision.clip import ClipVisionModel
from megatron_vlm.layers.vision.hd import HdClipVisionModel, HdConnector
from megatron_vlm.models.families.xcomposer2.config import XComposer2Config
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.parts.build import build_clip, build_projector
from megatron_vlm.models.vlm import VisionLanguageModel, build_stage
from megatron_vlm.parallel.topology import Topology


def build_xcomposer2(
    config: XComposer2Config, topology: Topology, options: ModelOptions, *, vp_stage: int | None = None
) -> VisionLanguageModel:
    """Builds one stage; only the first owns tower and connector."""
    tower = partial(build_clip, config.vision, tower=HdClipVisionModel if config.hd else ClipVisionModel)
    layer = ModuleSpec(PartialLoraLayer, params=dict(rank=config.plora_rank, dropout=config.plora_dropout))
    return build_stage(config.text, topology, options, vp_stage, tower, partial(_build_connector, config), layer)


def _build_connector(config: XComposer2Config, topology: Topology, options: ModelOptions) -> HdConnector:
    width = config.feature_size
    projection = build_projector(Projector, width, config.text.hidden_size, topology, options)
    return HdConnector(projection, width if config.hd else None)
