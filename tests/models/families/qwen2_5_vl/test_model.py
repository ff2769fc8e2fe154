"""Qwen2.5-VL against transformers: logits, loss and every gradient in fp32, eager attention; and that the bar shows mistakes."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from megatron_vlm import registry
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.layers.vision import qwen_vit
from megatron_vlm.models.families.qwen2_5_vl.mapping import NAMES
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.mutations import assert_noticed, mutated_logits
from megatron_vlm.testing.parity import hf_reference, layout_logits
from megatron_vlm.testing.parity_check import Bars, check_parity
from megatron_vlm.testing.twins.qwen2_5_vl import inputs_of, make_samples, write_tiny_qwen2_5_vl

BARS = Bars()  # measured: logits 2.2e-6 of the largest, 1.9 x noise, loss 5e-8, gradients 4.2e-6
TIMES = 30
TRUE_ORDER = qwen_vit.order

# (rows, columns) of the blocks of each image, and text tokens; windows are of 2 x 2 blocks.
SAMPLES = [([(3, 5)], 14), ([], 23), ([(1, 2), (4, 4), (2, 7)], 9), ([(2, 2)], 5)]
# Videos (rows, columns, pairs of frames, seconds of a pair), one between images; 1.3 x 4 positions are no whole number.
VIDEOS = [([(2, 3), (3, 5, 3, 1.3), (1, 2)], 9), ([], 11), ([(1, 1, 1, 1.0), (2, 2, 4, 0.2)], 7)]
TWINS = {
    "": {},
    "odd": dict(vision=dict(num_heads=3, fullatt_block_indexes=[0, 2], window_size=48), tie=True),
    "videos": dict(vision=dict(num_heads=3, fullatt_block_indexes=[2])),
    "wide blocks": dict(vision=dict(spatial_merge_size=3, window_size=48)),
}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Name -> (directory, HF model, samples, inputs of transformers)."""
    made = {}

    def make(name):
        if name not in made:
            directory = str(tmp_path_factory.mktemp("twin"))
            hf = write_tiny_qwen2_5_vl(directory, **TWINS[name])
            config = registry.get("qwen2_5_vl").config(hf.config.to_dict())
            samples = make_samples(config, VIDEOS if name == "videos" else SAMPLES)
            made[name] = directory, hf, samples, inputs_of(hf.config.to_dict())
        return made[name]

    return make


@pytest.mark.parametrize("name", ["", "odd", "videos", pytest.param("wide blocks", marks=pytest.mark.full)])
def test_forward_and_gradients_equal_hf(twins, name):
    directory, hf, samples, inputs = twins(name)
    loss, logits, grads = hf_reference(hf, samples, inputs=inputs)
    exact = hf_reference(copy.deepcopy(hf).double(), samples, gradients=False, inputs=inputs)[1]
    theirs = loss, logits, {NAMES.file_name(n): g for n, g in grads.items()}
    check_parity(name, directory, samples, theirs, exact, BARS)


@pytest.mark.full  # kernels are compiled for a minute
def test_the_fused_backend_gives_the_same(twins):
    directory, _, samples, _ = twins("")
    row = row_from_samples(samples)
    (plain,), (fused,) = (
        run_distributed(layout_logits, directory, [row], {}, {"transformer_impl": impl}) for impl in ("local", "fused")
    )
    assert torch.allclose(plain["logits"][0], fused["logits"][0], atol=1e-5 * float(plain["logits"][0].abs().max()))


def row_major(rows, columns, block, window):
    """Windows cut off one after the other from row-major blocks."""
    true = TRUE_ORDER(rows, columns, block, window)
    return dataclasses.replace(TRUE_ORDER(rows, columns, block, max(rows, columns)), windows=true.windows)


def changed(**fields):
    def make(*sizes):
        ordered = TRUE_ORDER(*sizes)
        return dataclasses.replace(ordered, **{name: change(ordered) for name, change in fields.items()})

    return make


ORDERS = {
    "windows in row-major order": row_major,
    "features in the order of the windows": changed(back=lambda o: torch.arange(len(o.back))),
    "columns turn before rows": changed(positions=lambda o: o.positions.flip(1)),
    "rows and columns of the window": changed(positions=lambda o: o.positions % 4),
}


def columns_first(patches, block):
    """The patches of a block of 2 x 2, column by column."""
    return patches.unflatten(0, (-1, 2, 2)).transpose(1, 2).flatten(0, 2)


def mutate(name, model, batch, patch):
    """Makes one mistake; returns the batch to run."""
    tower, positions = model.vision_model, batch.position_ids
    if name in ORDERS:
        patch(qwen_vit, "order", ORDERS[name])
    elif name == "windows everywhere":
        for layer in tower.encoder.layers:
            layer.__class__ = qwen_vit.WindowLayer
    elif name == "whole images everywhere":
        patch(qwen_vit, "cumulative", lambda counts, device: torch.tensor([0, sum(counts)], dtype=torch.int32))
    elif name == "patches of a block column by column":
        patch(
            qwen_vit.PatchMerger,
            "forward",
            lambda self, x, counts: self.mlp(self.norm(columns_first(x, 2)).view(-1, self.width)),
        )
    elif name == "norm of a block":
        weight = model.connector.norm.weight.repeat(4)
        patch(
            qwen_vit.PatchMerger,
            "forward",
            lambda self, x, counts: self.mlp(F.rms_norm(x.reshape(-1, self.width), (self.width,), weight, 1e-6)),
        )
    elif name == "merger gelu tanh":
        model.connector.mlp.activation_func = lambda x: F.gelu(x, approximate="tanh")
    elif name == "the first frame twice":
        weight = tower.patch_embedding.weight
        weight.data[:, :, 1] = weight.data[:, :, 0]
    elif name == "sections of the axes in another order":
        rotary = model.language_model.rotary_angles
        rotary.axes = rotary.axes.flip(0)
    elif name == "axes one by one":
        rotary = model.language_model.rotary_angles
        rotary.axes = torch.arange(len(rotary.axes)) % 3
    elif name == "one position a token":
        return with_positions(batch, torch.cat([torch.arange(n) for n in batch.segments]))
    elif name == "text goes on after all tokens of an image":
        text = torch.cat([torch.arange(n) for n in batch.segments])
        return with_positions(batch, torch.where(positions[0] == positions[1], text, positions))
    elif name == "time of a video stands still":
        return with_positions(batch, torch.stack([positions.min(0)[0], *positions[1:]]))
    elif name == "time of a video by its pairs":
        held = (positions != positions[1:2]).any(0)
        time = torch.where(held, positions[0] - (positions[0] - positions[1]).clamp(min=0) // 2, positions[0])
        return with_positions(batch, torch.stack([time, *positions[1:]]))
    elif name == "frames of a pair in the other order":
        weight = tower.patch_embedding.weight
        weight.data = weight.data.flip(2)
    elif name == "attention across pairs":
        patch(qwen_vit, "cumulative", lambda counts, device: torch.tensor([0, sum(counts)], dtype=torch.int32))
    elif name == "attention across samples":
        total = batch.starts[-1]
        return dataclasses.replace(batch, cu_seqlens=torch.tensor([0, total], dtype=torch.int32), starts=(0, total))
    elif name == "no bias of keys and queries in the decoder":
        for layer in model.language_model.decoder.layers:
            layer.self_attention.linear_qkv.bias.data.zero_()
    return batch


def with_positions(batch, positions):
    return dataclasses.replace(batch, tokens={**batch.tokens, "position_ids": positions})


MUTATIONS = [
    *ORDERS,
    "windows everywhere",
    "whole images everywhere",
    "patches of a block column by column",
    "norm of a block",
    "the first frame twice",
    "sections of the axes in another order",
    "axes one by one",
    "one position a token",
    "text goes on after all tokens of an image",
    "attention across samples",
    "no bias of keys and queries in the decoder",
]


VIDEO_MUTATIONS = [
    "time of a video stands still",
    "time of a video by its pairs",
    "frames of a pair in the other order",
    "attention across pairs",
]


def mutated(directory, row, names):
    return mutated_logits(mutate, directory, row, names)


def test_mistakes_show(twins):
    for name, mistakes in (("", MUTATIONS), ("odd", ["merger gelu tanh"]), ("videos", VIDEO_MUTATIONS)):
        directory, hf, samples, inputs = twins(name)
        expected = hf_reference(hf, samples, gradients=False, inputs=inputs)[1]
        (logits,) = run_distributed(mutated, directory, row_from_samples(samples), mistakes)
        assert_noticed(logits, expected, mistakes, bar=BARS.logits, times=TIMES)
