"""Builds Gemma 3's stages: SigLIP, mean of blocks of patches with norm and one linear, a decoder of local and global layers.

    pixels --SiglipVisionModel--> [P, Hv] --mean of k x k patches--> [F, Hv] --RMSNorm, linear--> [F, H]

Legend: k side of a block of patches. The tower is split over tensor parallel ranks; where its heads do not divide it runs whole
on every rank, as the linear always does. Semantics: transformers 5.23, models/gemma3/modeling_gemma3.py.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_vlm.layers.backend import backend_of
from megatron_vlm.layers.norm import make_parameter
from megatron_vlm.models.families.gemma3.config import Gemma3ModelConfig
from megatron_vlm.models.language import transformer_config
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.parts.build import build_siglip
from megatron_vlm.models.vlm import VisionLanguageModel, build_stage
from megatron_vlm.parallel.topology import Topology


class Gemma3Connector(nn.Module):
    """Means of blocks of patches, a norm and a linear.

    Args:
        config: of megatron-core: ``hidden_size`` of the output.
        width: of the patches; ``epsilon``: of the norm.
        pool: side of a block.
    """

    def __init__(self, config: TransformerConfig, width: int, epsilon: float, pool: int):
        super().__init__()
        self.pool = pool
        self.norm = backend_of(config).norm(config)(config, width, epsilon)
        self.projection = make_parameter(torch.zeros(width, config.hidden_size, dtype=config.params_dtype), config)

    def forward(self, patches: Tensor, counts: Sequence[int]) -> Tensor:
        """patches [P, Hv] with ``counts`` per image, all equal squares -> features [F, H]."""
        side = math.isqrt(counts[0]) // self.pool
        blocks = patches.view(len(counts), side, self.pool, side, self.pool, -1)
        return self.norm(blocks.mean((2, 4)).flatten(0, 2)) @ self.projection


def build_gemma3(
    config: Gemma3ModelConfig, topology: Topology, options: ModelOptions, *, vp_stage: int | None = None
) -> VisionLanguageModel:
    """Builds one stage; only the first owns tower and connector."""
    tower = partial(build_siglip, config.vision, smallest=config.pool, stretched=False)

    def connector(topology: Topology, options: ModelOptions) -> Gemma3Connector:
        mcore = transformer_config(
            topology,
            options,
            decoder=False,
            tp=1,
            num_layers=1,
            hidden_size=config.text.hidden_size,
            num_attention_heads=1,
            normalization="RMSNorm",
            layernorm_zero_centered_gamma=True,
        )
        return Gemma3Connector(mcore, config.vision.hidden_size, config.vision.norm_epsilon, config.pool)

    return build_stage(config.text, topology, options, vp_stage, tower, connector)
