"""Idefics3 and SmolVLM against transformers: logits, loss and every gradient in fp32, eager attention; mistakes show."""

import copy

import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.layers.vision import siglip
from megatron_vlm.models.families.smolvlm import model as smolvlm
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.mutations import assert_noticed, mutated_logits
from megatron_vlm.testing.parity import hf_reference
from megatron_vlm.testing.parity_check import Bars, check_parity
from megatron_vlm.testing.twins.smolvlm import hf_inputs, make_samples, write_tiny_smolvlm

BARS = Bars(logits=2e-5)  # measured: logits 2.7e-6 of the largest, 1.3 x noise, loss 7e-8, gradients 4.6e-6
TIMES = 30
SAMPLES = [(3, 14), (0, 23), (5, 9), (1, 5)]  # tiles and text tokens
TWINS = {
    "smolvlm": (dict(kind="SmolVLM"), None),
    "idefics3": (dict(kind="Idefics3"), None),
    # Heads and patches of odd numbers, 3 x 3 patches a token as in SmolVLM 2.2B, tiles smaller than the position table.
    "odd": (dict(kind="SmolVLM", shuffle=3, tie=False, vision=dict(num_attention_heads=3, image_size=57)), 38),
}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Name -> (directory, HF model, samples)."""
    made = {}

    def make(name):
        if name not in made:
            options, tile = TWINS[name]
            directory = str(tmp_path_factory.mktemp(name))
            hf = write_tiny_smolvlm(directory, **options)
            config = registry.get("smolvlm").config(hf.config.to_dict())
            made[name] = directory, hf, make_samples(config, SAMPLES, tile=tile)
        return made[name]

    return make


def no_true_gradient(name):
    """A constant added to every key changes no attention weight where there is no RoPE."""
    return "vision_model" in name and name.endswith("k_proj.bias")


@pytest.mark.parametrize("name", TWINS)
def test_forward_and_gradients_equal_hf(twins, name):
    directory, hf, samples = twins(name)
    theirs = hf_reference(hf, samples, inputs=hf_inputs)
    exact = hf_reference(copy.deepcopy(hf).double(), samples, gradients=False, inputs=hf_inputs)[1]
    check_parity(name, directory, samples, theirs, exact, BARS, no_true_gradient)


true_shuffle, true_positions = smolvlm.pixel_shuffle, siglip.position_ids


def columns_first(patches, tiles, factor):
    """Within a block column by column."""
    out = true_shuffle(patches, tiles, factor)
    return out.view(len(out), factor, factor, -1).transpose(1, 2).reshape(out.shape)


def transposed_grid(patches, tiles, factor):
    """The features of a tile column by column, as InternVL's first version."""
    out = true_shuffle(patches, tiles, factor)
    side = int((len(out) // tiles) ** 0.5)
    return out.view(tiles, side, side, -1).transpose(1, 2).reshape(out.shape)


def runs_of_patches(patches, tiles, factor):
    """Patches that follow one another are joined, not neighbours."""
    return patches.reshape(len(patches) // factor**2, -1)


def counted_positions(rows, columns, side):
    """Positions of the table's corner, not stretched over it."""
    return (torch.arange(rows)[:, None] * side + torch.arange(columns)).reshape(-1)


def mutate(name, model, batch, patch):
    """Makes one mistake; returns the batch to run."""
    if name == "positions of a corner":
        patch(siglip, "position_ids", counted_positions)
    elif name == "table transposed":
        patch(
            siglip,
            "position_ids",
            lambda *grid: true_positions(*grid) % grid[2] * grid[2] + true_positions(*grid) // grid[2],
        )
    elif name == "attention across tiles":
        patch(siglip, "cumulative", lambda counts, device: torch.tensor([0, sum(counts)], dtype=torch.int32))
    elif name == "no norm after the tower":
        model.vision_model.encoder.final_layernorm = torch.nn.Identity()
    else:
        patch(smolvlm, "pixel_shuffle", {f.__name__: f for f in SHUFFLES}.get(name, true_shuffle))
    return batch


SHUFFLES = (columns_first, transposed_grid, runs_of_patches)
MUTATIONS = [
    "positions of a corner",
    "table transposed",
    "attention across tiles",
    "no norm after the tower",
    *(f.__name__ for f in SHUFFLES),
]


def mutated(directory, row, names):
    return mutated_logits(mutate, directory, row, names)


def test_mistakes_show(twins):
    directory, hf, samples = twins("odd")
    expected = hf_reference(hf, samples, gradients=False, inputs=hf_inputs)[1]
    (logits,) = run_distributed(mutated, directory, row_from_samples(samples), MUTATIONS)
    assert_noticed(logits, expected, MUTATIONS, bar=BARS.logits, times=TIMES)
