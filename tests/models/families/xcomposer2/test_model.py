"""XComposer2's own parts: the order of HD views, branches in packed rows, their dropout, and the parity bar's sharpness."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from megatron_vlm.data.row import row_from_samples
from megatron_vlm.errors import DataError
from megatron_vlm.layers.vision.hd import lay_out
from megatron_vlm.models.families.xcomposer2.config import XComposer2Config
from megatron_vlm.testing.distributed import RankError, run_distributed
from megatron_vlm.testing.mutations import assert_noticed, mutated_logits
from megatron_vlm.testing.parity import build_for_test, layout_logits, layout_run
from megatron_vlm.testing.twins.xcomposer2 import make_samples, write_tiny_xcomposer2
from megatron_vlm.testing.twins.xcomposer2_reference import Reference

LOGITS = 1e-5  # the bar of test_xcomposer2_parity.py, of the largest logit
TIMES = 30
ONE = (1, 1)
SAMPLES = [([(1, 2)], 14), ([], 23), ([ONE, (3, 1), (2, 2)], 9), ([ONE], 5)]
GRIDS = [(rows, columns) for rows in range(1, 5) for columns in range(1, 7)]
NEWLINE, SEPARATOR = -1, -2


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """(directory, config.json, samples) of a 4khd twin without dropout."""
    directory = str(tmp_path_factory.mktemp("hd"))
    config = write_tiny_xcomposer2(directory, "4khd-7b")
    return directory, config, make_samples(config, SAMPLES)


def numbered(views, side):
    """Patches whose single feature is their number."""
    return torch.arange(views * side * side, dtype=torch.float32)[:, None]


def laid_out(grids, side):
    patches = numbered(sum(1 + rows * columns for rows, columns in grids), side)
    features = lay_out(patches, grids, torch.full((1, 4), float(NEWLINE)), torch.full((1, 4), float(SEPARATOR)))
    return features.int().tolist()


def expected_order(grid, side, first=0):
    """Patch numbers in reading order, by the published description: one raster for the whole image, a newline a line."""
    rows, columns = grid

    def patch(row, column):
        """Number of the patch at (row, column) of the whole image; view 0 is the global one."""
        tile = 1 + (row // side) * columns + column // side
        return first + tile * side * side + row % side * side + column % side

    def lines(height, width, number):
        out = []
        for r in range(0, height, 2):
            for c in range(0, width, 2):
                out.append([number(r, c), number(r, c + 1), number(r + 1, c), number(r + 1, c + 1)])
            out.append([NEWLINE] * 4)
        return out

    globally = lines(side, side, lambda row, column: first + row * side + column)
    return [*globally, [SEPARATOR] * 4, *lines(rows * side, columns * side, patch)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_views_are_laid_out_in_reading_order(grid):
    assert laid_out([grid], 4) == expected_order(grid, 4)
    assert len(laid_out([grid], 24)) == (grid[0] * grid[1] + 1) * 144 + 1 + (grid[0] + 1) * 12


def test_known_cells_and_several_images():
    cells = laid_out([(1, 2)], 4)[2 * 3 + 1 :]  # after the global view's two lines and the separator
    # Tiles 0 and 1 of the whole image come after the 16 patches of the global view.
    assert [n - 16 for n in cells[0]] == [0, 1, 4, 5] and [n - 16 for n in cells[2]] == [16, 17, 20, 21]
    several = laid_out([(1, 2), (2, 1), ONE], 2)
    parts = [expected_order(grid, 2, first) for grid, first in (((1, 2), 0), ((2, 1), 12), (ONE, 24))]
    assert several == [feature for part in parts for feature in part]


def test_tokens_of_a_grid_are_what_the_model_makes(twin):
    config = XComposer2Config.from_hf(twin[1])
    for grid in GRIDS:
        assert config.tokens(*grid) == len(laid_out([grid], config.vision.side))


def not_whole_tiles(directory):
    _, _, (model,), _ = build_for_test(directory, {}, {})
    with pytest.raises(DataError, match="30x28 pixels is not whole tiles of 28x28"):
        model.vision_model([torch.zeros(3, 28, 30)])


def test_an_image_that_is_not_whole_tiles_is_an_error(twin):
    run_distributed(not_whole_tiles, twin[0])


def test_packed_rows_equal_one_sample_at_a_time(twin):
    """0, 1 and many images, mixed grids: the masks and images of a row do not meet."""
    directory, _, samples = twin
    rows = [row_from_samples(samples), row_from_samples(samples[::-1]), *(row_from_samples([s]) for s in samples)]
    (result,) = run_distributed(layout_logits, directory, rows, {}, {})
    packed, backwards, *alone = result["logits"]
    lengths = [len(sample.input_ids) for sample in samples]
    assert len({tuple(p.shape) for s in samples for p in s.pixels}) >= 4
    for ours, turned, single in zip(packed.split(lengths), reversed(backwards.split(lengths[::-1])), alone):
        scale = float(single.abs().max())
        assert float((ours - single).abs().max()) <= 5e-6 * scale
        assert float((turned - single).abs().max()) <= 5e-6 * scale


def dropped(directory, rows, parallel, options):
    """On a rank: loss and gradients in training, twice, the loss in evaluation, and what text alone loses by dropout."""
    result = layout_run(directory, rows, parallel, options)
    again = layout_run(directory, rows, parallel, options)
    _, _, (model,), _ = build_for_test(directory, parallel, options)
    with torch.no_grad():
        row = rows[0]
        training, evaluation = float(model.train()(row)), float(model.eval()(row))
        text = row_from_samples(make_samples_of_text(rows))
        text_losses = float(model.train()(text)), float(model.eval()(text))
    return result["loss"], result["grads"], again["loss"], (training, evaluation), text_losses


def make_samples_of_text(rows):
    from megatron_vlm.data.row import EncodedSample

    ids = rows[0].input_ids[:32]
    return [EncodedSample(key="text", input_ids=ids, labels=ids.clone())]


def test_dropout_is_active_in_training_keyed_and_off_in_evaluation(tmp_path):
    config = write_tiny_xcomposer2(tmp_path, "4khd-7b", plora_dropout=0.3)
    rows = [row_from_samples(make_samples(config, SAMPLES, seed=i), multiple_of=2) for i in range(2)]
    ((loss, grads, again, image, text),) = run_distributed(dropped, str(tmp_path), rows, {}, {})
    assert loss == again  # drawn from (seed, iteration, place) alone
    assert image[0] != image[1] and text[0] == text[1]  # text tokens have no branch to drop

    recompute = dict(recompute_granularity="full")
    ((recomputed, recomputed_grads, *_),) = run_distributed(dropped, str(tmp_path), rows, recompute, {})
    assert recomputed == loss  # a recomputed layer draws its own numbers again
    worst = max(float((g - recomputed_grads[n]).norm()) / max(float(g.norm()), 1e-3) for n, g in grads.items())
    assert worst <= 1e-5, worst

    split = dict(tensor_model_parallel_size=2)
    for parallel in (split, dict(split, sequence_parallel=True)):
        results = run_distributed(dropped, str(tmp_path), rows, parallel, {}, tp=2)
        assert len({result[0] for result in results}) == 1 and results[0][0] != image[1]
        for name, grad in results[0][1].items():  # what is whole on every rank has one gradient
            if name.endswith(("linear_qkv.plora.a", "linear_fc1.plora.a", "linear_proj.plora.b", "linear_fc2.plora.b")):
                torch.testing.assert_close(grad, results[1][1][name], rtol=1e-4, atol=1e-6)


def mutate(name, model, batch, patch):
    """Makes one mistake in the model, the module or the batch; returns the batch to run."""
    layers = model.language_model.decoder.layers
    if name == "branches on every token":
        everywhere = torch.arange(len(batch.input_ids))
        patch(type(layers[0]), "forward", with_positions(type(layers[0]).forward, everywhere))
    elif name == "branches one token late":
        late = (batch.image_positions + 1).clamp(max=len(batch.input_ids) - 1)
        patch(type(layers[0]), "forward", with_positions(type(layers[0]).forward, late))
    elif name == "no branch in one linear of one layer":
        layers[2].mlp.linear_fc2.plora.b.data.zero_()
    elif name == "gate's and up's branches swapped":
        for layer in layers:
            for factor in (layer.mlp.linear_fc1.plora.a, layer.mlp.linear_fc1.plora.b):
                factor.data.copy_(torch.cat(list(factor.data.chunk(2))[::-1]))
    elif name == "newline and separator swapped":
        connector = model.connector
        newline = connector.newline.data.clone()
        connector.newline.data.copy_(connector.separator.data[:, :, None][0])
        connector.separator.data.copy_(newline[0])
    elif name == "blocks of patches read down first":
        width = model.vision_model.class_embedding.shape[0]
        weight = model.connector.projection.mlp.linear_fc1.weight.data
        weight.copy_(weight.view(len(weight), 2, 2, width).transpose(1, 2).reshape(weight.shape))
    elif name == "gelu tanh for erf in the projection":
        model.connector.projection.mlp.activation_func = lambda x: F.gelu(x, approximate="tanh")
    elif name == "erf gelu for quick gelu in the tower":
        for layer in model.vision_model.encoder.layers:
            layer.mlp.activation_func = F.gelu
    elif name == "last layer of the tower left out":
        model.vision_model.encoder.layers = model.vision_model.encoder.layers[:-1]
    elif name == "bilinear global view":
        interpolate = F.interpolate
        patch(F, "interpolate", lambda x, size, mode, align_corners: interpolate(x, size, mode="bilinear"))
    elif name == "tower eps x 10":
        scale_eps(model.vision_model, 10)
    elif name == "decoder eps / 10":
        scale_eps(model.language_model, 0.1)
    return batch


def scale_eps(part, factor):
    for module in part.modules():
        if hasattr(module, "eps"):
            module.eps *= factor


def with_positions(forward, positions):
    def forward_with(self, *args, **kwargs):
        row = kwargs["packed_seq_params"]
        row.image_positions = positions
        row.__dict__.pop("text_mask", None)
        return forward(self, *args, **kwargs)

    return forward_with


MUTATIONS = [
    "branches on every token",
    "branches one token late",
    "no branch in one linear of one layer",
    "gate's and up's branches swapped",
    "newline and separator swapped",
    "blocks of patches read down first",
    "gelu tanh for erf in the projection",
    "erf gelu for quick gelu in the tower",
    "last layer of the tower left out",
    "bilinear global view",
]
EPS_MUTATIONS = ["tower eps x 10", "decoder eps / 10"]


def mutated(directory, row, names):
    return mutated_logits(mutate, directory, row, names)


def check(directory, samples, names):
    expected = Reference(directory).run(samples, gradients=False)[1]
    (logits,) = run_distributed(mutated, directory, row_from_samples(samples), names)
    assert_noticed(logits, expected, names, bar=LOGITS, times=TIMES)


def test_mistakes_show(twin):
    check(twin[0], twin[2], MUTATIONS)


def test_wrong_eps_shows(tmp_path):
    """On a twin whose residual streams start small: at unit scale nobody can see an epsilon."""
    config = write_tiny_xcomposer2(tmp_path, "7b")
    weights = load_file(tmp_path / "model.safetensors")
    for name, tensor in weights.items():
        if "embedding" in name:  # of the tower and of the decoder
            tensor *= 0.02
    save_file(weights, tmp_path / "model.safetensors")
    check(str(tmp_path), make_samples(config, [([ONE], 14), ([], 23)]), EPS_MUTATIONS)


def test_an_mlp_that_is_recomputed_alone_finds_its_own_mask(tmp_path):
    """With several microbatches in flight it would find another's."""
    config = write_tiny_xcomposer2(tmp_path, "4khd-7b")
    rows = [row_from_samples(make_samples(config, SAMPLES, seed=i), multiple_of=2) for i in range(2)]
    alone = dict(recompute_granularity="selective", recompute_modules=["mlp", "norm"])
    (plain,), (recomputed,) = (run_distributed(layout_run, str(tmp_path), rows, way, {}) for way in ({}, alone))
    assert all(torch.equal(recomputed["grads"][name], gradient) for name, gradient in plain["grads"].items())
    with pytest.raises(RankError, match="mlp does not go with partial LoRA over pipeline stages"):
        run_distributed(layout_run, str(tmp_path), rows, {**alone, "pipeline_model_parallel_size": 2}, {}, pp=2)
