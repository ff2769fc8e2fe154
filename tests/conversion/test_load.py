"""``load_into`` fills every parameter, tied copies included, and lists all that does not fit."""

import pytest
import torch

from megatron_vlm.conversion.convert import hf2mg
from megatron_vlm.conversion.load import load_into
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.errors import ConversionError
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2

EMBEDDING = "language_model.embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """HF directories: a tied Llama, and one with another ffn and vocabulary."""
    root = tmp_path_factory.mktemp("twins")
    write_tiny_idefics2(root / "tied", text="llama", tie=True)
    write_tiny_idefics2(root / "other", text="llama", tie=True, ffn=64, vocab_size=700)
    return root


def loaded(hf_dir, weights, parallel):
    """On a rank: parameters of a model built for ``hf_dir`` after ``weights`` were loaded; the error's text instead."""
    from megatron_vlm.testing.parity import build_for_test

    _, _, model, _ = build_for_test(str(hf_dir), parallel, {})
    parameters = list(model.named_parameters())
    for _, parameter in parameters:
        torch.nn.init.constant_(parameter, -7)
    with open_source(weights) as source:
        try:
            load_into(source, model)
        except ConversionError as error:
            return str(error)
    return {name: parameter.detach().clone() for name, parameter in parameters}


@pytest.mark.parametrize("tp, pp", [(2, 2), (1, 2)])
def test_any_layout_loads_any_other(twins, tmp_path, tp, pp):
    hf2mg(twins / "tied", tmp_path / "mg", tp=2, pp=4, vocab_multiple=64)
    parallel = dict(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    ranks = run_distributed(loaded, twins / "tied", tmp_path / "mg", parallel, tp=tp, pp=pp)
    with open_source(twins / "tied") as source:
        splits = {e.name: e.split for e in source.spec.mapping(source.config, tp=tp).padded(8)}
        seen = set()
        for rank, parameters in enumerate(ranks):
            for name, value in parameters.items():
                full = EMBEDDING if name == "language_model.output_layer.weight" else name  # the last stage's tied copy
                seen.add(name)
                assert torch.equal(value, splits[full].shard(source.read(full), tp, rank % tp)), name
    assert seen == {*splits, "language_model.output_layer.weight"}


def test_shapes_that_differ_are_listed(twins):
    (text,) = run_distributed(loaded, twins / "tied", twins / "other", {})
    assert f"{EMBEDDING}: the model has [408, 64], the weights give [704, 64]" in text
    assert (
        "language_model.decoder.layers.3.mlp.linear_fc1.weight: the model has [192, 64], the weights give [128, 64]"
        in text
    )
