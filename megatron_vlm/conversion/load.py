"""Weights into a model: this rank's stages, filled from any source.

WeightSource --read_shard--> parameters of the stages on the device (linears in 4 bits where the run keeps them so)
"""

import dataclasses
from collections.abc import Collection

import torch
from torch import nn

from megatron_vlm.errors import ConversionError
from megatron_vlm.models.built import Model, build_model, weight_name
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.parallel.shards import put
from megatron_vlm.parallel.topology import Topology
from megatron_vlm.peft.qlora import fill, take_weights
from megatron_vlm.sources.quantised import agree
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.weights.nf4.tensor import Quantization


def load_model(
    source: WeightSource,
    topology: Topology,
    options: ModelOptions,
    quantize: Quantization | None = None,
    keep: Collection[str] = (),
) -> Model:
    """Builds a model, its stages on this rank's device, and fills it.

    Args:
        source: of the weights.
        topology, options: as of ``models.built.build_model``; with ``build_on_cpu`` it stays in the CPU's memory.
        quantize: linears to keep in 4 bits; None: those that ``source`` stores so. Their weights never lie on the device in full.
        keep: global names of weights that train, and so are not quantised.

    Raises:
        ConfigError: the model does not divide over the topology, or is stored in 4 bits otherwise than asked for.
        ConversionError: the weights do not fit the model.
    """
    quantization, stays = agree(source, quantize, options.params_dtype), options.build_on_cpu
    if quantization is not None:
        options = dataclasses.replace(options, build_on_cpu=True)
    model = build_model(source.spec, source.config, topology, options)
    linears = take_weights(model, source, quantization, keep) if quantization is not None else {}
    model = model if stays else model.to(topology.device)
    load_into(source, model)
    if quantization is not None:
        fill(linears, source, quantization, model)
    return model


def load_into(source: WeightSource, model: Model) -> None:
    """Fills the parameters of this rank's stages, cast to each parameter's dtype; tied copies included.

    Args:
        source: at any layout of its own.
        model: its stages wrapped in DDP or not.

    Raises:
        ConversionError: a parameter that the source lacks, or shapes that differ; all are listed.
    """
    splits = {entry.name: entry.split for entry in model.mapping}
    tp, tp_rank = model.topology.tp, model.topology.tp_rank
    jobs: dict[str, list[nn.Parameter]] = {}
    problems = []
    for own, parameter in model.named_parameters():
        name = weight_name(own, parameter)
        if name not in splits:
            problems.append(f"{name}: in the model, not in the weights")
            continue
        expected = tuple(splits[name].shard(source.infos[name].meta(), tp, tp_rank).shape)
        if expected != tuple(parameter.shape):
            problems.append(f"{name}: the model has {list(parameter.shape)}, the weights give {list(expected)}")
        jobs.setdefault(name, []).append(parameter)
    if problems:
        raise ConversionError(f"the weights of {source.hf_dir} do not fit the model:\n  " + "\n  ".join(problems))
    with torch.no_grad():
        for name, parameters in jobs.items():
            shard = source.read_shard(name, splits[name], tp, tp_rank)
            for parameter in parameters:
                put(parameter, shard)
