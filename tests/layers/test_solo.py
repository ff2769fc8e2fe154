"""A group of one rank, beside real groups, is taken by megatron-core's exchanges: they leave what they are given alone."""

import torch

from megatron_vlm.layers.solo import SoloGroup
from megatron_vlm.testing.distributed import run_distributed


def exchanged():
    from megatron.core.tensor_parallel import mappings

    x, names = torch.randn(3, 4), ("copy_to", "reduce_from", "scatter_to", "gather_from")
    found = [getattr(mappings, f"{name}_tensor_model_parallel_region")(x, group=SoloGroup()) for name in names]
    return [torch.equal(y, x) for y in found]


def test_nothing_is_exchanged():
    assert run_distributed(exchanged, tp=2) == [[True] * 4] * 2
