"""The model as a whole: freezing, rows without images, recomputation behind frozen parts, counts, and its borders."""

import collections
import dataclasses
import re

import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.testing.distributed import RankError, run_distributed
from megatron_vlm.testing.parity import build_for_test, random_samples
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("twin"))
    hf = write_tiny_idefics2(directory, "llama", tie=True)
    return directory, registry.get("idefics2").config(hf.config.to_dict())


def gradients(directory, row, recompute, frozen_names):
    """On a rank: name -> gradient (None where there is none) with single parameters frozen by hand."""
    from megatron_vlm.models.built import global_parameters

    _, _, (model,), _ = build_for_test(directory, {"recompute_granularity": "full" if recompute else None}, {})
    parameters = global_parameters([model])
    for name, parameter in parameters.items():
        parameter.requires_grad_(not name.startswith(tuple(frozen_names)))
    model.train()
    model(row).backward()
    return {name: p.grad for name, p in parameters.items()}


def test_recompute_behind_a_frozen_embedding(tmp_path):
    """megatron-core's reentrant recomputation gives silent zeros to layers whose input needs no gradient."""
    hf = write_tiny_idefics2(tmp_path)
    config = registry.get("idefics2").config(hf.config.to_dict())
    frozen = ["language_model.embedding", "vision_model", "connector"]
    for sizes in ([], [(24, 24)]):  # text only, and an image through a frozen tower
        row = row_from_samples(random_samples(config, [(sizes, 12)]))
        (plain,) = run_distributed(gradients, str(tmp_path), row, False, frozen)
        (recomputed,) = run_distributed(gradients, str(tmp_path), row, True, frozen)
        assert {n for n, g in plain.items() if g is not None} == {n for n in plain if not n.startswith(tuple(frozen))}
        for name, grad in plain.items():
            if grad is not None:
                assert grad.abs().max() > 0, name
                torch.testing.assert_close(recomputed[name], grad, rtol=0, atol=0)


def test_recompute_of_the_tower_and_of_a_connector_behind_a_frozen_tower(twin):
    directory, config = twin
    row = row_from_samples(random_samples(config, [([(24, 24), (40, 16)], 12)]))
    for frozen in ([], ["vision_model"]):
        (plain,) = run_distributed(gradients, directory, row, False, frozen)
        (recomputed,) = run_distributed(gradients, directory, row, True, frozen)
        trained = [n for n in plain if n.startswith(("vision_model", "connector")) and not n.startswith(tuple(frozen))]
        assert len(trained) > 10
        for name in trained:
            assert plain[name].abs().max() > 0 or name.endswith("linear_qkv.bias"), name
            torch.testing.assert_close(recomputed[name], plain[name], rtol=0, atol=0)


RECOMPUTED = {
    "core_attention": r"language_model\.decoder.*core_attention",
    "mlp": r"language_model\.decoder.*\.mlp",
    "norm": r"language_model\.decoder.*layernorm",
    "connector": "connector",
    "tower": r"vision_model.*layers\.\d+",
}
"""Module -> names of what runs twice where it is recomputed."""


def counted(forward, name, runs):
    """``forward``, counted in ``runs``: a norm that is made again runs none of its hooks."""

    def run(*args, **kwargs):
        runs.update([name])
        return forward(*args, **kwargs)

    return run


def recomputed_in_part(directory, row, settings):
    """On a rank: of each setting, gradients by name, and how often each module ran."""
    found = []
    for parallel in settings:
        _, _, (model,), _ = build_for_test(directory, parallel, {})
        runs = collections.Counter()
        for name, module in model.named_modules():
            module.forward = counted(module.forward, name, runs)
        model.train()
        model(row).backward()
        found.append(({name: p.grad for name, p in model.named_parameters()}, runs))
    return found


def test_recompute_in_part_gives_the_same_gradients(twin):
    directory, config = twin
    row = row_from_samples(random_samples(config, [([(24, 24), (40, 16)], 12)]))
    sets = [[name] for name in RECOMPUTED] + [["core_attention", "norm", "mlp"]]
    settings = [{}, *({"recompute_granularity": "selective", "recompute_modules": names} for names in sets)]
    settings += [{"recompute_granularity": "full", "recompute_num_layers": 2}, {"recompute_granularity": "selective"}]
    (found,) = run_distributed(recomputed_in_part, directory, row, settings)
    (plain, once), *others = found
    layers = r"language_model\.decoder\.layers\.[01]"
    patterns = [[RECOMPUTED[name] for name in names] for names in sets]
    patterns += [[layers, RECOMPUTED["connector"], RECOMPUTED["tower"]], [RECOMPUTED["core_attention"]]]
    for (gradients, runs), wanted in zip(others, patterns, strict=True):
        assert all(torch.equal(gradients[name], gradient) for name, gradient in plain.items()), wanted
        again = {name for name in runs if runs[name] > once[name]}
        for pattern in wanted:
            assert any(re.fullmatch(pattern, name) for name in again), (pattern, again)
        assert all(any(re.match(pattern, name) for pattern in wanted) for name in again), (wanted, again)
    assert config.text.num_layers > 2  # two recomputed layers are not all


def test_a_row_without_images_gives_the_tower_zeros(twin):
    directory, config = twin
    (grads,) = run_distributed(gradients, directory, row_from_samples(random_samples(config, [([], 12)])), False, [])
    for name, grad in grads.items():
        assert grad is not None, name
        if name.startswith(("vision_model", "connector")):
            assert grad.abs().max() == 0


def wrong_count(directory, row):
    _, _, (model,), _ = build_for_test(directory, {}, {})
    try:
        model(row)
    except DataError as error:
        return str(error)
    return ""


def test_features_and_positions_that_differ_in_number_are_an_error_with_both(twin):
    directory, config = twin
    row = row_from_samples(random_samples(config, [([(24, 24)], 12)]))
    row = dataclasses.replace(row, image_positions=row.image_positions[:-1])
    (message,) = run_distributed(wrong_count, directory, row)
    assert "1 images gives 5 image features for 4 image tokens" in message


def frozen_flags(directory, parallel, freeze):
    from megatron_vlm.models.built import global_named_parameters

    _, _, chunks, _ = build_for_test(directory, parallel, {"freeze": freeze})
    return {name: p.requires_grad for chunk in chunks for name, p in global_named_parameters(chunk)}


def test_freezing_reaches_both_copies_of_a_tied_weight(twin):
    first, last = run_distributed(frozen_flags, twin[0], {"pipeline_model_parallel_size": 2}, ("llm",), pp=2)
    assert first["language_model.embedding.word_embeddings.weight"] is False
    assert last["language_model.output_layer.weight"] is False
    assert not any(last.values())
    assert {name.split(".")[0] for name, trains in first.items() if trains} == {"vision_model", "connector"}


def sharding(directory, parallel):
    """Marks as megatron-core's own initialisation sets them, the marks we set, and shapes."""
    from megatron.core.optimizer.clip_grads import param_is_not_tensor_parallel_duplicate

    from megatron_vlm.models.built import global_parameters

    _, _, chunks, _ = build_for_test(directory, parallel, {})
    return {
        name: (p.tensor_model_parallel, p.partition_dim, param_is_not_tensor_parallel_duplicate(p), tuple(p.shape))
        for name, p in global_parameters(chunks).items()
    }


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, dict(vision_heads=3, perceiver_heads=3, perceiver_kv_heads=3)])
def test_parameters_are_cut_and_counted_as_the_mapping_says(tmp_path, tp, options):
    """Shapes of the modules agree with the map; the gradient norm counts every shard once and every replica once."""
    hf = write_tiny_idefics2(tmp_path, "llama", **options)
    spec = registry.get("idefics2")
    mapping = spec.mapping(spec.config(hf.config.to_dict()), tp=tp).padded(8)
    ranks = run_distributed(sharding, str(tmp_path), {"tensor_model_parallel_size": tp}, tp=tp)
    assert set(ranks[0]) == {entry.name for entry in mapping}
    tensors = hf.state_dict()
    sharded = 0
    for entry in mapping:
        full = entry.to_full([tensors[name] for name in entry.hf])
        shards = entry.split.shards(full, tp)
        for rank, marks in enumerate(ranks):
            parallel, dim, counted, shape = marks[entry.name]
            assert shape == tuple(shards[rank].shape), entry.name
            assert (dim if parallel else None) == entry.split.dim, entry.name
            assert counted == (parallel or rank == 0), entry.name
        sharded += entry.split.dim is not None
    assert sharded >= 20


def build_only(directory, parallel):
    build_for_test(directory, parallel, {})


def test_sizes_that_do_not_divide_name_the_legal_ones(tmp_path):
    write_tiny_idefics2(tmp_path, "llama", heads=6, kv_heads=3, text_hidden=48, layers=2)
    with pytest.raises(RankError, match=r"6 heads, 3 kv heads.*use one of 1, 3, 6"):
        run_distributed(build_only, str(tmp_path), {"tensor_model_parallel_size": 2}, tp=2)
    with pytest.raises(RankError, match="2 decoder layers for pipeline_model_parallel_size 3: lower it"):
        run_distributed(build_only, str(tmp_path), {"pipeline_model_parallel_size": 3}, pp=3)
    with pytest.raises(RankError, match="world size 2 is not a multiple of tensor x pipeline parallel size 2 x 2"):
        sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
        run_distributed(build_only, str(tmp_path), sizes, dp=2)


def test_an_unknown_group_is_an_error():
    from megatron_vlm.models.options import ModelOptions

    with pytest.raises(ConfigError, match="'vision'"):
        ModelOptions(freeze=("visoin",))
