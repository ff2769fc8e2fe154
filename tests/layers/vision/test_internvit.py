"""InternViT's parts against transformers and plain torch: positions, pixel shuffle, drop path, norm over all heads."""

import types

import pytest
import torch
from torch import nn
from transformers.models.internvl.modeling_internvl import InternVLModel

from megatron_vlm import registry
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.layers.vision.internvit import InternVisionModel, ScaledResidual, WidthRMSNorm, pixel_shuffle
from megatron_vlm.models.built import build_model
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import build_for_test
from megatron_vlm.testing.twins.internvl3 import make_samples, write_tiny_internvl3

CONFIG = types.SimpleNamespace(
    hidden_size=12, params_dtype=torch.float32, use_cpu_initialization=True, sequence_parallel=False
)


@pytest.mark.parametrize("side, factor", [(4, 2), (6, 2), (8, 4)])
def test_pixel_shuffle_equals_transformers(side, factor):
    patches = torch.randn(3, side, side, 5)
    theirs = InternVLModel.pixel_shuffle(None, patches, scale_factor=1 / factor)
    ours = pixel_shuffle(patches.reshape(-1, 5), 3, factor)
    assert torch.equal(ours, theirs.reshape(-1, 5 * factor**2))


def tower():
    options = dict(hidden_size=4, patch_size=8, num_channels=3, side=4, dtype=torch.float32)
    return InternVisionModel(nn.Identity(), **options, device=torch.device("cpu"))


@pytest.mark.parametrize("shape, message", [((3, 30, 32), "32x30"), ((3, 36, 36), "of 36"), ((3, 33, 16), "16x33")])
def test_images_that_are_no_columns_of_tiles_are_an_error(shape, message):
    with pytest.raises(DataError, match=message):
        tower()([torch.zeros(shape)])


def test_tiles_of_different_sizes_are_an_error():
    with pytest.raises(DataError, match="16x16 pixels is not a column of square tiles of 32"):
        tower()([torch.zeros(3, 32, 32), torch.zeros(3, 16, 16)])


def test_drop_path_leaves_out_whole_tiles_and_keeps_the_mean():
    residual = ScaledResidual(CONFIG, drop_path=0.25)
    residual.scale.data.fill_(0.5)
    residual.tile_tokens, tiles = 3, 8000
    x, update, bias = torch.zeros(tiles * 3, 1, 12), torch.ones(tiles * 3, 1, 12), torch.ones(12)
    torch.manual_seed(0)
    out = residual(True, False)((update, bias), x, 0.0)
    per_tile = out.view(tiles, -1)
    assert (per_tile == per_tile[:, :1]).all()
    assert per_tile[:, 0].unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert abs(float((per_tile[:, 0] == 0).float().mean()) - 0.25) < 0.02
    torch.manual_seed(0)
    assert torch.equal(residual(True, False)((update, bias), x, 0.0), out)
    assert torch.equal(residual(False, False)((update, bias), x, 0.0), torch.ones_like(x))


def norm_of_a_rank(x, weight, gradient):
    """On a rank: its heads of the normed queries, and gradients."""
    import torch.distributed as dist

    from megatron_vlm.parallel.config import ParallelConfig
    from megatron_vlm.parallel.topology import build_topology

    size = dist.get_world_size()
    topology = build_topology(ParallelConfig(tensor_model_parallel_size=size), num_layers=1, device=torch.device("cpu"))
    norm = WidthRMSNorm(CONFIG, 3, topology.tp_group, eps=1e-2)
    norm.weight.data.copy_(weight.chunk(size)[topology.tp_rank])
    mine = x.chunk(size, 2)[topology.tp_rank].clone().requires_grad_()
    out = norm(mine)
    out.backward(gradient.chunk(size, 2)[topology.tp_rank])
    return out.detach(), mine.grad, norm.weight.grad


def test_norm_over_all_heads_of_all_ranks():
    x, weight, gradient = torch.randn(5, 1, 4, 3, requires_grad=True), torch.rand(12), torch.randn(5, 1, 4, 3)
    weight.requires_grad_()
    expected = nn.functional.rms_norm(x.flatten(2), (12,), weight, 1e-2).view(x.shape)
    expected.backward(gradient)
    for tp in (1, 2, 4):
        results = run_distributed(norm_of_a_rank, x.detach(), weight.detach(), gradient, tp=tp)
        for index, wanted in enumerate((expected.detach(), x.grad, weight.grad)):
            found = torch.cat([result[index] for result in results], 2 if index < 2 else 0)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def losses(directory, row, parallel, rate):
    """On a rank: loss with drop path twice from the same seed, and gradients of the first."""
    from megatron_vlm.parallel.rng import seed_step

    topology, _, (model,), _ = build_for_test(directory, parallel, {"drop_path_rate": rate})
    model.train()
    found = []
    for _ in range(2):
        seed_step(topology, seed=7, iteration=3)
        model.zero_grad()
        loss = model(row)
        loss.backward()
        found.append(float(loss))
    gradient = model.vision_model.patch_embedding.weight.grad
    return found, gradient


def test_drop_path_is_the_same_in_every_tensor_parallel_rank_and_under_recomputation(tmp_path):
    hf = write_tiny_internvl3(tmp_path)
    config = registry.get("internvl3").config(hf.config.to_dict())
    row = row_from_samples(make_samples(config, [([3, 2], 9), ([1], 4)]))
    results = {}
    for name, parallel, rate in (
        ("none", {}, 0.0),
        ("one", {}, 0.5),
        ("recomputed", {"recompute_granularity": "full"}, 0.5),
        ("two ranks", {"tensor_model_parallel_size": 2}, 0.5),
    ):
        tp = parallel.get("tensor_model_parallel_size", 1)
        results[name] = run_distributed(losses, str(tmp_path), row, parallel, rate, tp=tp)[0]
    found, gradient = results["one"]
    assert found[0] == found[1] and abs(found[0] - results["none"][0][0]) > 1e-3
    for name in ("recomputed", "two ranks"):
        torch.testing.assert_close(torch.tensor(results[name][0]), torch.tensor(found), rtol=1e-5, atol=0)
        torch.testing.assert_close(results[name][1], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_a_tower_without_drop_path_refuses_a_rate():
    with pytest.raises(ConfigError, match=r"drop_path_rate 0\.1: the tower of family idefics2"):
        build_model(registry.get("idefics2"), None, None, ModelOptions(drop_path_rate=0.1))
