"""Weights into a model: this rank's stages, filled from any source.

WeightSource --read_shard--> parameters of the stages on the device (linears in 4 bits where the run keeps them so)
"""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from megatron_vlm.errors import ConversionError
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.vlm import build_model, global_named_parameters
from megatron_vlm.parallel.topology import Topology
from megatron_vlm.peft.qlora import fill, take_weights
from megatron_vlm.sources.quantised import agree
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.weights.nf4 import Quantization

_OUTPUT, _EMBEDDING = "language_model.output_layer.weight", "language_model.embedding.word_embeddings.weight"


def load_stages(
    source: WeightSource,
    topology: Topology,
    options: ModelOptions,
    quantize: Quantization | None = None,
    keep: Collection[str] = (),
) -> list[Any]:
    """Builds this rank's stages on its device and fills them.

    Args:
        source: of the weights.
        topology, options: as of ``models.vlm.build_model``.
        quantize: linears to keep in 4 bits; None: those that ``source`` stores so. Their weights never lie on the device in full.
        keep: global names of weights that train, and so are not quantised.

    Raises:
        ConfigError: the model does not divide over the topology, or is stored in 4 bits otherwise than asked for.
        ConversionError: the weights do not fit the model.
    """
    if quantize is not None or source.quantization is not None:
        return _load_quantised(source, topology, options, quantize, keep)
    stages = [stage.to(topology.device) for stage in build_model(source.spec, source.config, topology, options)]
    multiple = options.make_vocab_size_divisible_by
    load_into(source, stages, tp=topology.tp, tp_rank=topology.tp_rank, vocab_multiple=multiple)
    return stages


def load_into(
    source: WeightSource,
    chunks: Sequence[nn.Module],
    *,
    tp: int,
    tp_rank: int,
    vocab_multiple: int,
    names: Iterable[str] | None = None,
) -> None:
    """Fills the parameters of this rank's stages, cast to each parameter's dtype; tied copies included.

    Args:
        source: at any layout of its own.
        chunks: this rank's stages, wrapped in DDP or not.
        tp, tp_rank: this rank's place.
        vocab_multiple: the model's ``make_vocab_size_divisible_by``.
        names: only these global names; None: all.

    Raises:
        ConversionError: a parameter that the source lacks, or shapes that differ; all are listed.
    """
    splits = {
        entry.name: entry.split for entry in source.spec.mapping(source.config, tp=tp, vocab_multiple=vocab_multiple)
    }
    wanted = None if names is None else set(names)
    jobs: dict[str, list[nn.Parameter]] = {}
    problems = []
    for chunk in chunks:
        for name, parameter in global_named_parameters(chunk):
            if getattr(parameter, "tied_copy", False) and name == _OUTPUT:
                name = _EMBEDDING
            if wanted is not None and name not in wanted:
                continue
            if name not in splits:
                problems.append(f"{name}: in the model, not in the weights")
                continue
            expected = tuple(splits[name].shard(source.infos[name].meta(), tp, tp_rank).shape)
            if expected != tuple(parameter.shape):
                problems.append(f"{name}: the model has {list(parameter.shape)}, the weights give {list(expected)}")
            jobs.setdefault(name, []).append(parameter)
    problems += [f"{name}: asked for, not in the model" for name in sorted((wanted or set()) - set(jobs))]
    if problems:
        raise ConversionError(f"the weights of {source.hf_dir} do not fit the model:\n  " + "\n  ".join(problems))
    with torch.no_grad():
        for name, parameters in jobs.items():
            shard = source.read_shard(name, splits[name], tp, tp_rank)
            for parameter in parameters:
                parameter.copy_(shard)


def _load_quantised(
    source: WeightSource, topology: Topology, options: ModelOptions, wanted: Quantization | None, keep: Collection[str]
) -> list[Any]:
    """``load_stages`` with linears in NF4; ``wanted`` None: as the source stores them."""
    quantization = agree(source, wanted, options.params_dtype)
    assert quantization is not None
    place: dict[str, Any] = dict(tp=topology.tp, tp_rank=topology.tp_rank)
    stages = build_model(source.spec, source.config, topology, dataclasses.replace(options, build_on_cpu=True))
    linears = take_weights(stages, source, quantization, keep)
    stages = [stage.to(topology.device) for stage in stages]
    load_into(source, stages, **place, vocab_multiple=options.make_vocab_size_divisible_by)
    fill(linears, source, quantization, **place, device=topology.device)
    return stages
