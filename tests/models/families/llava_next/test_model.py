"""LLaVA-NeXT and LLaVA-OneVision against transformers: logits, loss and every gradient in fp32, eager; mistakes show."""

import copy

import pytest
import torch
import torch.nn.functional as F

from megatron_vlm import registry
from megatron_vlm.data.images.anyres import AnyRes
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.layers.vision import anyres, clip
from megatron_vlm.models.families.llava_next.mapping import NAMES
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.mutations import assert_noticed, mutated_logits
from megatron_vlm.testing.parity import hf_reference
from megatron_vlm.testing.parity_check import Bars, check_parity
from megatron_vlm.testing.twins.llava_next import hf_inputs, make_samples, write_tiny_llava_next

BARS = Bars(logits=2e-5)
TIMES = 30
# (width, height) of images: wide, none, high and square, a strip whose features are cut on both sides; words after them.
SAMPLES = [([(84, 23)], 14), ([], 23), ([(28, 50), (100, 100)], 9), ([(10, 90)], 5)]
TWINS = {
    "vicuna": (dict(), SAMPLES),
    "mistral": (
        dict(
            text=dict(model_type="mistral", sliding_window=64),
            vision=dict(num_attention_heads=3, image_size=38),
            tie=True,
        ),
        SAMPLES[:3],
    ),
    # Two images are single squares; the last one has more features than four tiles, and is shrunk.
    "onevision": (dict(kind="LlavaOnevision", tie=True), [*SAMPLES, ([(100, 108)], 5)]),
}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Name -> (directory, HF model, samples)."""
    made = {}

    def make(name):
        if name not in made:
            options, specs = TWINS[name]
            directory = str(tmp_path_factory.mktemp(name))
            hf = write_tiny_llava_next(directory, **options)
            config = registry.get("llava_next").config(hf.config.to_dict())
            made[name] = directory, hf, make_samples(config, specs)
        return made[name]

    return make


def no_true_gradient(name):
    """A constant added to every key changes no attention weight where there is no RoPE."""
    return name.startswith("vision_tower") and name.endswith("k_proj.bias")


@pytest.mark.parametrize("name", ["vicuna", pytest.param("mistral", marks=pytest.mark.full), "onevision"])
def test_forward_and_gradients_equal_hf(twins, name):
    directory, hf, samples = twins(name)
    loss, logits, grads = hf_reference(hf, samples, inputs=hf_inputs)
    exact = hf_reference(copy.deepcopy(hf).double(), samples, gradients=False, inputs=hf_inputs)[1]
    grads = {NAMES.file_name(n): g for n, g in grads.items()}
    # What the feature layer does not need is carried along and never trains: our side has no gradient of it.
    unused = {
        n for n in grads if "vision" in n and ("post_layernorm" in n or ("layers.2." in n and name != "onevision"))
    }
    assert unused and not any(float(grads[n].norm()) for n in unused)
    assert float(grads["image_newline"].norm()) > 0
    theirs = loss, logits, {n: g for n, g in grads.items() if n not in unused}
    check_parity(name, directory, samples, theirs, exact, BARS, no_true_gradient)


true_lines = AnyRes.lines


def cut_at_one_end(self, view):
    """As many rows and columns as are right, all of the black at the end."""
    lines = true_lines(self, view)
    return lines._replace(top=0, left=0)


def mutate(name, model, batch, patch):
    """Makes one mistake; returns the batch to run."""
    connector = model.connector
    if name == "black at one end":
        patch(AnyRes, "lines", cut_at_one_end)
    elif name == "newline of zeros":
        connector.newline.data.zero_()
    elif name == "newline in front":
        patch(
            torch,
            "cat",
            lambda parts, dim=0: TRUE_CAT([parts[1], parts[0]] if dim == 1 and is_lines(parts) else parts, dim),
        )
    elif name == "newline before the projector's scale":
        connector.newline.data.mul_(1.01)
    elif name == "tiles column by column":
        patch(connector, "_laid_out", lambda view, own: columns_first(connector, view, own))
    elif name == "the whole last":
        patch(connector, "_laid_out", lambda view, own: list(reversed(type(connector)._laid_out(connector, view, own))))
    elif name == "aligned corners":
        patch(anyres.F, "interpolate", lambda x, size, mode: TRUE_INTERPOLATE(x, size, mode=mode, align_corners=True))
    elif name == "nearest":
        patch(anyres.F, "interpolate", lambda x, size, mode: TRUE_INTERPOLATE(x, size, mode="nearest"))
    elif name == "attention across views":
        patch(clip, "cumulative", lambda counts, device: torch.tensor([0, sum(counts)], dtype=torch.int32))
    return batch


TRUE_CAT, TRUE_INTERPOLATE = torch.cat, F.interpolate


def is_lines(parts):
    return len(parts) == 2 and parts[0].dim() == 3 and parts[1].shape[1] == 1


def columns_first(connector, view, features):
    """Tiles in the order of columns."""
    area = connector.anyres.side**2
    if view.rows:
        whole, tiles = features[:area], features[area:].view(view.rows, view.columns, area, -1)
        features = TRUE_CAT(
            [whole, tiles.reshape(view.columns, view.rows, area, -1).transpose(0, 1).reshape(-1, whole.shape[1])]
        )
    return type(connector)._laid_out(connector, view, features)


MUTATIONS = {
    "vicuna": [
        "black at one end",
        "newline of zeros",
        "newline in front",
        "newline before the projector's scale",
        "tiles column by column",
        "the whole last",
        "attention across views",
    ],
    "onevision": ["aligned corners", "nearest", "newline of zeros"],
}


def mutated(directory, row, names):
    return mutated_logits(mutate, directory, row, names)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mistakes_show(twins, name):
    directory, hf, samples = twins(name)
    expected = hf_reference(hf, samples, gradients=False, inputs=hf_inputs)[1]
    (logits,) = run_distributed(mutated, directory, row_from_samples(samples), MUTATIONS[name])
    assert_noticed(logits, expected, MUTATIONS[name], bar=BARS.logits, times=TIMES)
