"""Norms, and the mark by which their gradients are summed under sequence parallelism."""

from types import SimpleNamespace

import pytest
import torch

from megatron_vlm.layers.norm import HeadRMSNorm, LayerNorm, RMSNorm


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_they_are_those_of_the_formulas(sequence_parallel):
    config = SimpleNamespace(
        params_dtype=torch.float64, use_cpu_initialization=True, sequence_parallel=sequence_parallel
    )
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rms, layer = RMSNorm(config, 8, 1e-3), LayerNorm(config, 8, 1e-3)
    with torch.no_grad():
        rms.weight.mul_(2)
        layer.bias.add_(1)
    assert torch.allclose(rms(x), 2 * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt(), atol=1e-14)
    centred = x - x.mean(-1, keepdim=True)
    assert torch.allclose(layer(x), centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() + 1, atol=1e-14)
    for parameter in (*rms.parameters(), *layer.parameters()):
        assert parameter.sequence_parallel is sequence_parallel
    # Of heads: each over its own width, the gradient summed over the ranks that heads lie on and not once more over tokens.
    heads = HeadRMSNorm(config, 4, 1e-3)
    y, parts = heads(x.view(3, 2, 4)), x.view(3, 2, 4)
    assert torch.allclose(y, parts / (parts.square().mean(-1, keepdim=True) + 1e-3).sqrt(), atol=1e-14)
    assert heads.weight.part_over_heads and not heads.weight.sequence_parallel
