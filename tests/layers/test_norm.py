"""Norms, and the mark by which their gradients are summed under sequence parallelism."""

from types import SimpleNamespace

import pytest
import torch

from megatron_vlm.layers.norm import HeadRMSNorm, LayerNorm, NormedResidual, RMSNorm


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_they_are_those_of_the_formulas(sequence_parallel):
    config = SimpleNamespace(
        params_dtype=torch.float64,
        use_cpu_initialization=True,
        sequence_parallel=sequence_parallel,
        layernorm_zero_centered_gamma=False,
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


def test_weights_one_apart():
    """Gemma's: as its class in transformers, in bf16 too, where 1 + weight is not rounded; and added to a residual."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    config = SimpleNamespace(
        params_dtype=torch.bfloat16,
        use_cpu_initialization=True,
        sequence_parallel=True,
        layernorm_zero_centered_gamma=True,
    )
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(50, 64, generator=generator).bfloat16() for _ in range(2))
    ours, theirs = NormedResidual(config, 64, 1e-6), Gemma3RMSNorm(64, 1e-6).bfloat16()
    weight = (0.3 * torch.randn(64, generator=generator)).bfloat16()
    ours.weight.data.copy_(weight)
    theirs.weight.data.copy_(weight)
    assert (RMSNorm.forward(ours, x) - theirs(x)).abs().max() <= 2**-7 * theirs(x).abs().max()
    assert (RMSNorm.forward(ours, x) == theirs(x)).float().mean() > 0.99  # the rest by the last bit
    assert torch.equal(ours(True, False)((x, None), residual, 0.0), residual + RMSNorm.forward(ours, x))
    assert ours.weight.sequence_parallel
