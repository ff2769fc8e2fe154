"""Builds InternVL3's stages: InternViT, pixel shuffle and MLP connector, Qwen2.5 decoder.

    pixels --InternVisionModel--> [P, Hv] --pixel shuffle--> [F, 4 Hv] --norm, linear, GELU, linear--> [F, H]

The tower is split over tensor parallel ranks; where its heads do not divide it runs whole on every rank.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from megatron_vlm.layers.projector import Projector
from megatron_vlm.layers.vision.internvit import pixel_shuffle
from megatron_vlm.models.families.internvl3.config import InternVL3ModelConfig
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.parts.build import build_internvit, build_projector
from megatron_vlm.models.vlm import VisionLanguageModel, build_stage
from megatron_vlm.parallel.topology import Topology

_NORM_EPSILON = 1e-5  # of the connector: both implementations take torch's default


class InternVL3Connector(Projector):
    """Pixel shuffle and projector."""

    shuffle: int

    def forward(self, patches: Tensor, counts: Sequence[int]) -> Tensor:  # type: ignore[override]
        """patches [P, Hv] with ``counts`` per tile -> features [F, H]."""
        return super().forward(pixel_shuffle(patches, len(counts), self.shuffle))


def build_internvl3(
    config: InternVL3ModelConfig, topology: Topology, options: ModelOptions, *, vp_stage: int | None = None
) -> VisionLanguageModel:
    """Builds one stage; only the first owns tower and connector."""
    tower = partial(build_internvit, config.vision, smallest=config.shuffle)
    connector = partial(_build_connector, config)
    return build_stage(config.text, topology, options, vp_stage, tower, connector)


def _build_connector(config: InternVL3ModelConfig, topology: Topology, options: ModelOptions) -> InternVL3Connector:
    width, hidden = config.vision.hidden_size * config.shuffle**2, config.text.hidden_size
    connector = build_projector(InternVL3Connector, width, hidden, topology, options, _NORM_EPSILON)
    connector.shuffle = config.shuffle
    return connector
