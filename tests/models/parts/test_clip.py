"""The CLIP tower against transformers' CLIPVisionModel: hidden states and every gradient, split over ranks and not."""

import pytest
import torch

from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.parts.build import build_clip
from megatron_vlm.models.parts.clip import ClipConfig, clip_entries
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.topology import build_topology
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import gradient_errors
from megatron_vlm.weights.mapping import Mapping

STATES = 5e-6  # of the largest state; measured 4e-7
GRADIENT = 2e-5  # of the gradient's norm; measured 1.1e-6
ZERO_GRADIENTS = ".self_attn.k_proj.bias"  # a constant added to every key changes no attention weight
SIZE = 28


def hf_tower(**options):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    settings = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=SIZE, patch_size=7
    )
    model = CLIPVisionModel._from_config(CLIPVisionConfig(**{**settings, **options}), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.15)
    return model


def on_rank(hf_config, weights, images, parallel, select_layer, options):
    """States and gradients of the sum of states x fixed numbers, by name of the full tensor."""
    config = ParallelConfig(**parallel)
    topology = build_topology(config, num_layers=1, device=torch.device("cpu"))
    clip = ClipConfig.from_hf(hf_config, select_layer)
    tower = build_clip(clip, topology, ModelOptions(**options)).train()
    entries = Mapping(entries=tuple(clip_entries(clip, topology.tp, "vision_model.", "")), vocab_size=0).by_name()
    parameters = dict(tower.named_parameters())
    assert set(parameters) == set(entries)
    with torch.no_grad():
        for name, parameter in parameters.items():
            entry = entries[name]
            full = entry.to_full([weights[hf] for hf in entry.hf])
            parameter.copy_(entry.split.shard(full, topology.tp, topology.tp_rank))
    states, counts = tower(images)
    (states * torch.arange(states.numel()).reshape(states.shape).cos()).sum().backward()
    grads = {name: p.grad for name, p in parameters.items() if p.requires_grad}
    return states.detach(), counts, grads


@pytest.mark.parametrize(
    "heads, select_layer, parallel, act",
    [
        (4, -1, {}, "quick_gelu"),
        (4, -2, {"tensor_model_parallel_size": 2}, "gelu"),
        (2, -2, {"tensor_model_parallel_size": 4}, "quick_gelu"),  # runs whole on every rank
    ],
)
def test_states_and_gradients_equal_hf(heads, select_layer, parallel, act):
    hf = hf_tower(num_attention_heads=heads, hidden_act=act)
    images = list(torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)))
    expected = hf(torch.stack(images), output_hidden_states=True).hidden_states[select_layer][:, 1:].flatten(0, 1)
    (expected * torch.arange(expected.numel()).reshape(expected.shape).cos()).sum().backward()
    theirs = {f"vision_model.{name}": p.grad for name, p in hf.named_parameters() if p.grad is not None}

    weights = {f"vision_model.{name}": p.detach() for name, p in hf.named_parameters()}
    tp = parallel.get("tensor_model_parallel_size", 1)
    options = {"recompute_granularity": "full"} if tp > 1 else {}
    results = run_distributed(on_rank, hf.config.to_dict(), weights, images, parallel, select_layer, options, tp=tp)
    clip = ClipConfig.from_hf(hf.config.to_dict(), select_layer)
    ours = {}
    for entry in clip_entries(clip, tp, "vision_model.", ""):
        if entry.name in results[0][2]:
            shards = [grads[entry.name] for _, _, grads in results]
            full = entry.split.merge(shards if entry.split.dim is not None else shards[:1])
            ours |= dict(zip(entry.hf, entry.from_full(full)))
    difference = float(((results[0][0] - expected).abs().max() / expected.abs().max()).detach())
    errors = gradient_errors(ours, theirs)  # the layers that are not selected have no gradient on either side
    worst = max(e for name, e in errors.items() if not name.endswith(ZERO_GRADIENTS))
    print(f"states {difference:.1e}, worst gradient {worst:.1e}")
    assert results[0][1] == [16, 16, 16]
    assert difference <= STATES
    assert worst <= GRADIENT


def refused(hf_config):
    topology = build_topology(ParallelConfig(), num_layers=1, device=torch.device("cpu"))
    tower = build_clip(ClipConfig.from_hf(hf_config), topology, ModelOptions())
    with pytest.raises(DataError, match="positions for 28x28 pixels, got an image of 21x28"):
        tower([torch.zeros(3, 28, 21)])


def test_an_image_of_another_size_is_an_error():
    run_distributed(refused, hf_tower().config.to_dict())


def test_configs_that_are_not_built_are_refused():
    config = hf_tower().config.to_dict()
    with pytest.raises(ConfigError, match="relu"):
        ClipConfig.from_hf({**config, "hidden_act": "relu"})
    with pytest.raises(ConfigError, match="hidden state -4 of a CLIP tower of 3 layers"):
        ClipConfig.from_hf(config, select_layer=-4)
