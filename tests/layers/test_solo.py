"""A group of one rank is taken by megatron-core's exchanges as it is: they leave what they are given alone."""

import torch
from megatron.core.tensor_parallel import mappings

from megatron_vlm.layers.solo import SoloGroup


def test_nothing_is_exchanged():
    x = torch.randn(3, 4)
    for exchange in (
        mappings.copy_to_tensor_model_parallel_region,
        mappings.reduce_from_tensor_model_parallel_region,
        mappings.scatter_to_tensor_model_parallel_region,
        mappings.gather_from_tensor_model_parallel_region,
    ):
        assert torch.equal(exchange(x, group=SoloGroup()), x)
