"""The projector against plain torch, on one and several tensor parallel ranks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megatron_vlm.models.parts.projector import projector_entries
from megatron_vlm.testing.distributed import run_distributed

IN, OUT = 12, 8


def project(features, weights, gradient, epsilon):
    """On a rank: output, and gradients of the features and of its shard of the first linear."""
    import torch.distributed as dist

    from megatron_vlm.layers.projector import Projector
    from megatron_vlm.models.language import transformer_config
    from megatron_vlm.models.options import ModelOptions
    from megatron_vlm.parallel.config import ParallelConfig
    from megatron_vlm.parallel.topology import build_topology

    size = dist.get_world_size()
    topology = build_topology(ParallelConfig(tensor_model_parallel_size=size), num_layers=1, device=torch.device("cpu"))
    config = transformer_config(
        topology,
        ModelOptions(),
        decoder=False,
        tp=1,
        num_layers=1,
        hidden_size=OUT,
        num_attention_heads=1,
        activation_func=F.gelu,
        add_bias_linear=True,
    )
    module = Projector(config, IN, topology.tp_group, epsilon)
    norm = None if epsilon is None else "0"
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for entry in projector_entries("", ("1", "3"), norm):
            full = entry.to_full([weights[name] for name in entry.hf])
            parameters[entry.name].copy_(entry.split.shard(full, size, topology.tp_rank))
    features.requires_grad_()
    out = module(features)
    out.backward(gradient)
    return out.detach(), features.grad, module.mlp.linear_fc1.weight.grad


@pytest.mark.parametrize("epsilon", [None, 1e-5])
def test_equals_plain_torch(epsilon):
    norm = nn.LayerNorm(IN, eps=1e-5) if epsilon else nn.Identity()
    expected = nn.Sequential(norm, nn.Linear(IN, OUT), nn.GELU(), nn.Linear(OUT, OUT))
    for parameter in expected.parameters():
        nn.init.normal_(parameter, std=0.5)
    features, gradient = torch.randn(7, IN, requires_grad=True), torch.randn(7, OUT)
    out = expected(features)
    out.backward(gradient)
    weights = {name: tensor.detach() for name, tensor in expected.named_parameters()}
    for tp in (1, 2, 4):
        results = run_distributed(project, features.detach(), weights, gradient, epsilon, tp=tp)
        for found in results:
            torch.testing.assert_close(found[0], out.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found[1], features.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            torch.cat([found[2] for found in results]), expected[1].weight.grad, rtol=1e-5, atol=1e-6
        )
