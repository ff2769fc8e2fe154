"""Builds the stages of Idefics3 and SmolVLM: SigLIP, pixel shuffle and one linear, Llama decoder.

    pixels --SiglipVisionModel--> [P, Hv] --pixel shuffle--> [F, s * s * Hv] --linear--> [F, H]

Legend: s side of a block of patches that becomes one token. The tower is split over tensor parallel ranks; where its heads do
not divide it runs whole on every rank. Semantics: transformers 5.23, models/idefics3/modeling_idefics3.py.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from megatron_vlm.layers.projector import LinearProjector
from megatron_vlm.layers.vision.internvit import pixel_shuffle
from megatron_vlm.models.families.smolvlm.config import SmolVLMModelConfig
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.parts.build import build_linear_projector, build_siglip
from megatron_vlm.models.vlm import VisionLanguageModel, build_stage
from megatron_vlm.parallel.topology import Topology


class SmolVLMConnector(nn.Module):
    """Pixel shuffle and a linear."""

    def __init__(self, shuffle: int, modality_projection: LinearProjector):
        super().__init__()
        self.shuffle = shuffle
        self.modality_projection = modality_projection

    def forward(self, patches: Tensor, counts: Sequence[int]) -> Tensor:
        """patches [P, Hv] with ``counts`` per tile, all equal -> features [F, H]."""
        return self.modality_projection(pixel_shuffle(patches, len(counts), self.shuffle))


def build_smolvlm(
    config: SmolVLMModelConfig, topology: Topology, options: ModelOptions, *, vp_stage: int | None = None
) -> VisionLanguageModel:
    """Builds one stage; only the first owns tower and connector."""
    tower = partial(build_siglip, config.vision, smallest=config.shuffle)
    width, hidden = config.vision.hidden_size * config.shuffle**2, config.text.hidden_size

    def connector(topology: Topology, options: ModelOptions) -> SmolVLMConnector:
        return SmolVLMConnector(config.shuffle, build_linear_projector(width, hidden, topology, options))

    return build_stage(config.text, topology, options, vp_stage, tower, connector)
