"""Qwen3-VL against transformers: logits, loss and every gradient in fp32, eager attention; and that the bar shows mistakes."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from megatron_vlm import registry
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.layers.deepstack import DeepStackLayer
from megatron_vlm.layers.vision import qwen_vit
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.mutations import assert_noticed, mutated_logits
from megatron_vlm.testing.parity import hf_reference, layout_logits
from megatron_vlm.testing.parity_check import Bars, check_parity
from megatron_vlm.testing.twins.qwen2_5_vl import inputs_of, make_samples
from megatron_vlm.testing.twins.qwen3_vl import write_tiny_qwen3_vl

BARS = Bars()  # measured: logits 8.2e-6 of the largest, 1.3 x noise, loss 6e-8, gradients 4.1e-6
TIMES = 30
TRUE_LEARNED = qwen_vit.Order.learned

# (rows, columns) of the blocks of each image, and text tokens; the table of positions is of 5 x 5.
SAMPLES = [([(3, 5)], 14), ([], 23), ([(1, 2), (4, 4), (2, 7)], 9), ([(2, 2)], 5)]
TWINS = {
    "": {},
    "odd": dict(vision=dict(num_heads=3, deepstack_visual_indexes=[1]), tie=True),
    "steep": dict(
        std=0.2, vision=dict(num_heads=3, deepstack_visual_indexes=[0, 1, 2])
    ),  # GELU's two forms are told apart
    "wide blocks": dict(
        vision=dict(spatial_merge_size=3, num_position_embeddings=49, deepstack_visual_indexes=[0, 1, 2])
    ),
}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Name -> (directory, HF model, samples, inputs of transformers)."""
    made = {}

    def make(name):
        if name not in made:
            directory = str(tmp_path_factory.mktemp("twin"))
            hf = write_tiny_qwen3_vl(directory, **TWINS[name])
            config = registry.get("qwen3_vl").config(hf.config.to_dict())
            made[name] = directory, hf, make_samples(config, SAMPLES), inputs_of(hf.config.to_dict())
        return made[name]

    return make


@pytest.mark.parametrize("name", ["", "odd", pytest.param("wide blocks", marks=pytest.mark.full)])
def test_forward_and_gradients_equal_hf(twins, name):
    directory, hf, samples, inputs = twins(name)
    theirs = hf_reference(hf, samples, inputs=inputs)
    exact = hf_reference(copy.deepcopy(hf).double(), samples, gradients=False, inputs=inputs)[1]
    check_parity(name, directory, samples, theirs, exact, BARS)


@pytest.mark.full  # kernels are compiled for a minute
def test_the_fused_backend_gives_the_same(twins):
    directory, _, samples, _ = twins("")
    row = row_from_samples(samples)
    (plain,), (fused,) = (
        run_distributed(layout_logits, directory, [row], {}, {"transformer_impl": impl}) for impl in ("local", "fused")
    )
    assert torch.allclose(plain["logits"][0], fused["logits"][0], atol=1e-5 * float(plain["logits"][0].abs().max()))


def nearest(order, side):
    """The nearest position of the table in place of what lies between four."""
    index, weights = TRUE_LEARNED(order, side)
    return index, F.one_hot(weights.argmax(1), 4).float()


def inner(order, side):
    """As images are interpolated: outer patches lie within the outer positions."""
    corners = [(order.positions[:, i] + 0.5) * side / order.size[i] - 0.5 for i in (0, 1)]
    moved = dataclasses.replace(order, positions=torch.stack(corners, 1).clamp(0, side - 1), size=(side, side))
    return TRUE_LEARNED(moved, side)


def corner(order, side):
    """Positions of the table as they are, without regard to the size of an image."""
    return TRUE_LEARNED(dataclasses.replace(order, size=(side, side)), side)


def transposed(order, side):
    return TRUE_LEARNED(dataclasses.replace(order, positions=order.positions.flip(1), size=order.size[::-1]), side)


LEARNED = {
    "nearest learned position": nearest,
    "learned positions as pixels": inner,
    "learned positions from a corner": corner,
    "learned positions row by column": transposed,
    "no learned positions": lambda order, side: (TRUE_LEARNED(order, side)[0], torch.zeros(len(order.positions), 4)),
}


def features(change):
    """A merger whose parts of a feature, (last layer, levels), are what ``change`` makes of them."""
    true = qwen_vit.DeepStackMerger.forward
    return lambda self, patches, counts: torch.cat(
        change(list(true(self, patches, counts).chunk(1 + len(self.levels), -1))), -1
    )


MERGED = {
    "the first level left out": lambda parts: [parts[0], torch.zeros_like(parts[1]), parts[2]],
    "the last level left out": lambda parts: [*parts[:2], torch.zeros_like(parts[2])],
    "levels behind each other's layers": lambda parts: [parts[0], parts[2], parts[1]],
    "levels added to the embeddings": lambda parts: [sum(parts), *map(torch.zeros_like, parts[1:])],
    "levels one layer late": lambda parts: [parts[0], torch.zeros_like(parts[1]), *parts[1:]],
}


def before(self, hidden_states, **kwargs):
    """A level is added before the layer that it belongs behind."""
    width = self.config.hidden_size
    if hidden_states.shape[-1] == width:
        return super(DeepStackLayer, self).forward(hidden_states=hidden_states, **kwargs)
    own, level, rest = hidden_states.split([width, width, hidden_states.shape[-1] - 2 * width], -1)
    output, context = super(DeepStackLayer, self).forward(hidden_states=own + level, **kwargs)
    return torch.cat([output, rest], -1), context


def mutate(name, model, batch, patch):
    """Makes one mistake; returns the batch to run."""
    tower, rotary = model.vision_model, model.language_model.rotary_angles
    if name in LEARNED:
        patch(qwen_vit.Order, "learned", LEARNED[name])
    elif name in MERGED:
        patch(qwen_vit.DeepStackMerger, "forward", features(MERGED[name]))
    elif name == "levels before their layers":
        patch(DeepStackLayer, "forward", before)
    elif name == "a level of the layer before":
        tower.levels = (tower.levels[0], tower.levels[1] - 1)
    elif name == "mergers of levels norm each patch":
        for merger in model.connector.levels:
            merger.normed = merger.width // 4
            merger.norm.weight.data, merger.norm.bias.data = (
                x.data[: merger.normed] for x in (merger.norm.weight, merger.norm.bias)
            )
    elif name == "merger gelu tanh":
        for merger in (model.connector, *model.connector.levels):
            merger.mlp.activation_func = lambda x: F.gelu(x, approximate="tanh")
    elif name == "tower gelu exact":
        for layer in tower.encoder.layers:
            layer.mlp.activation_func = F.gelu
    elif name == "axes one after the other":
        rotary.axes = rotary.axes.sort()[0]
    elif name == "axes in another turn":
        rotary.axes = torch.where(rotary.axes > 0, 3 - rotary.axes, 0)
    elif name == "one position a token":
        positions = torch.cat([torch.arange(n) for n in batch.segments])
        return dataclasses.replace(batch, tokens={**batch.tokens, "position_ids": positions})
    elif name == "no norm of queries in the decoder":
        for layer in model.language_model.decoder.layers:
            layer.self_attention.q_layernorm.weight.data.fill_(1.0)
    return batch


MUTATIONS = [
    *LEARNED,
    *MERGED,
    "levels before their layers",
    "a level of the layer before",
    "mergers of levels norm each patch",
    "axes one after the other",
    "axes in another turn",
    "one position a token",
    "no norm of queries in the decoder",
]


def mutated(directory, row, names):
    return mutated_logits(mutate, directory, row, names)


def test_mistakes_show(twins):
    for name, mistakes in (("", MUTATIONS), ("steep", ["merger gelu tanh", "tower gelu exact"])):
        directory, hf, samples, inputs = twins(name)
        expected = hf_reference(hf, samples, gradients=False, inputs=inputs)[1]
        (logits,) = run_distributed(mutated, directory, row_from_samples(samples), mistakes)
        assert_noticed(logits, expected, mistakes, bar=BARS.logits, times=TIMES)
