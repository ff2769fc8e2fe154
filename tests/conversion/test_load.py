"""``load_into`` fills every parameter, tied copies included, and lists all that does not fit."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.conversion.load import load_into
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.errors import ConversionError
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.testing.twins.model_folders import assert_same_model

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


def assert_loaded(hf_dir, weights, tp=1, pp=1, **parallel):
    """Every tensor of every rank is the part of the HF one that it should be, bit for bit, and none is missing."""
    parallel |= dict(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    ranks = run_distributed(loaded, hf_dir, weights, parallel, tp=tp, pp=pp)
    with open_source(hf_dir) as source:
        splits = {e.name: e.split for e in source.spec.mapping(source.config, tp=tp).padded(8)}
        seen = set()
        for rank, parameters in enumerate(ranks):
            for name, value in parameters.items():
                full = EMBEDDING if name == "language_model.output_layer.weight" else name  # the last stage's tied copy
                seen.add(name)
                assert torch.equal(value, splits[full].shard(source.read(full), tp, rank % tp)), name
    assert seen == {*splits, "language_model.output_layer.weight"}


@pytest.mark.parametrize("tp, pp", [(2, 2), (1, 2)])
def test_any_layout_loads_any_other(twins, tmp_path, tp, pp):
    hf2mg(twins / "tied", tmp_path / "mg", tp=2, pp=3, vocab_multiple=64)  # 1, 2 and 1 layers
    assert_loaded(twins / "tied", tmp_path / "mg", tp, pp)


@pytest.mark.full
def test_28_layers_in_folders_and_stages_of_other_splits(tmp_path):
    """Folders of 8 and of 4 stages (7 layers each) into stages that are even, as even as can be, and as told; and back."""
    hf = tmp_path / "hf"
    write_tiny_idefics2(hf, text="llama", tie=True, layers=28)
    for files, stages in ((8, 4), (4, 8)):
        mg = tmp_path / f"mg{files}"
        hf2mg(hf, mg, pp=files)
        assert_loaded(hf, mg, pp=stages)
        assert_loaded(hf, mg, pp=8, decoder_layers_per_stage=(0, 5, 5, 4, 4, 4, 4, 2))
        mg2hf(mg, tmp_path / f"hf{files}")
        assert_same_model(hf, tmp_path / f"hf{files}")
    hf2mg(tmp_path / "mg8", tmp_path / "again", pp=4)
    for path in sorted((tmp_path / "mg4").glob("mp_rank_*/*")):
        assert (tmp_path / "again" / path.relative_to(tmp_path / "mg4")).read_bytes() == path.read_bytes()


def test_shapes_that_differ_are_listed(twins):
    (text,) = run_distributed(loaded, twins / "tied", twins / "other", {})
    assert f"{EMBEDDING}: the model has [408, 64], the weights give [704, 64]" in text
    assert (
        "language_model.decoder.layers.3.mlp.linear_fc1.weight: the model has [192, 64], the weights give [128, 64]"
        in text
    )


def anonymous() -> int:
    """Bytes of this process that are no file's: what the page cache holds for all ranks does not count."""
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def held_while_loading(hf_dir, parallel, options):
    """On a rank: (bytes of its parameters, most bytes held beside those that are filled, largest tensor in fp32)."""
    from megatron_vlm.models.built import build_model
    from megatron_vlm.models.options import ModelOptions
    from megatron_vlm.parallel.config import ParallelConfig
    from megatron_vlm.parallel.topology import build_topology

    source = open_source(hf_dir)
    layers = source.config.text.num_layers
    topology = build_topology(ParallelConfig(**parallel), num_layers=layers, device=torch.device("cpu"))
    model = build_model(source.spec, source.config, topology, ModelOptions(make_vocab_size_divisible_by=8, **options))
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    read, before, filled, most = source.read_shard, anonymous(), 0, 0

    def watched(name, *args):
        nonlocal filled, most
        shard = read(name, *args)
        most = max(most, anonymous() - before - filled)
        filled += sizes[name]
        return shard

    source.read_shard = watched
    load_into(source, model)
    return sum(sizes.values()), most, max(4 * info.meta().numel() for info in source.infos.values())


def held_while_cut_and_filled(hf_dir, quantize, offload):
    """On a rank: the same three numbers of a base under adapters whose parameters are cut over ranks, and what of it is whole."""
    from megatron_vlm.conversion.load import outline
    from megatron_vlm.models.options import ModelOptions
    from megatron_vlm.parallel.config import ParallelConfig
    from megatron_vlm.parallel.shards import held
    from megatron_vlm.parallel.topology import build_topology
    from megatron_vlm.peft import qlora
    from megatron_vlm.peft.config import PeftConfig
    from megatron_vlm.peft.lora import apply_lora
    from megatron_vlm.peft.qlora import quantization_of
    from megatron_vlm.testing.parity import adapted_plan
    from megatron_vlm.training.optimizer import sharded
    from megatron_vlm.training.optimizer.build import wrap_model

    settings = dict(target_modules="all-linear", r=2, quantize=quantize)
    source, most = open_source(hf_dir), 0
    layers = source.config.text.num_layers
    parallel = ParallelConfig(data_parallel_sharding="parameters", offload=offload)
    topology = build_topology(parallel, num_layers=layers, device=torch.device("cpu"))

    def watched(work, *args, **kwargs):
        nonlocal most
        result = work(*args, **kwargs)
        most = max(most, anonymous())
        return result

    options = ModelOptions(make_vocab_size_divisible_by=8, params_dtype="bf16", build_on_cpu=True)
    plan = adapted_plan(source, settings)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((sharded, "_shard"), (sharded, "_to_host"), (source, "read_shard"), (qlora, "shard")):
            patch.setattr(owner, name, partial(watched, getattr(owner, name)))
        before = anonymous()
        model, fill = outline(source, topology, options, quantization_of(PeftConfig(**settings), "bf16"), plan.saved)
        model = wrap_model(apply_lora(model, plan, seed=0), parallel)
        fill(model)
    own = sum(held(parameter)[0].nbytes for _, parameter in model.named_parameters())
    whole = sum(parameter.nbytes for _, parameter in model.named_parameters())
    return own, max(most, anonymous()) - before - own, max(2 * i.meta().numel() for i in source.infos.values()), whole


@pytest.mark.full
@pytest.mark.parametrize("offload", ["none", "optimizer+parameters"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_base_of_adapters_is_cut_before_it_comes(tmp_path, quantize, offload):
    write_tiny_idefics2(tmp_path, dtype=torch.bfloat16, max_shard_size="30MB", text_hidden=512, ffn=1024, layers=24)
    ranks = run_distributed(held_while_cut_and_filled, str(tmp_path), quantize, offload, dp=4, timeout=400)
    for own, most, largest, whole in ranks:
        print(f"{own >> 20} of {whole >> 20} MiB, {most >> 20} beside, largest tensor {largest >> 20} in bf16")
        assert own == pytest.approx(whole / 4, rel=0.02) and most < (whole - own) / 2


@pytest.mark.full
@pytest.mark.parametrize("tp", [1, 2])
def test_a_rank_holds_a_few_tensors_beside_its_own(tmp_path, tp):
    """Layers of one shape, as of a large model: what is held while they come does not grow with their number."""
    write_tiny_idefics2(
        tmp_path, dtype=torch.bfloat16, max_shard_size="30MB", text_hidden=512, ffn=1024, layers=24 * tp
    )
    parallel, options = dict(tensor_model_parallel_size=tp), {"params_dtype": "bf16"}
    for own, most, largest in run_distributed(held_while_loading, str(tmp_path), parallel, options, tp=tp, timeout=300):
        print(f"tp {tp}: {own >> 20} MiB of parameters, {most >> 20} beside, largest tensor in fp32 {largest >> 20}")
        assert own > 7 * largest and most < 5 * largest + (4 << 20)
