"""Weights into a model: this rank's stages, filled from any source.

    WeightSource --outline--> stages without values (--wrap_model--> cut over ranks) --fill--> values of what this rank holds

Tensor by tensor, onto the device (linears in 4 bits where the run keeps them so).
"""

import dataclasses
from collections.abc import Callable, Collection

import torch
from torch import nn

from megatron_vlm.errors import ConversionError
from megatron_vlm.models.built import Model, build_model, weight_name
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.parallel.shards import put
from megatron_vlm.parallel.topology import Topology
from megatron_vlm.peft import qlora
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
    """Builds a model, its stages on this rank's device, and fills it; arguments and errors as of ``outline``."""
    model, fill = outline(source, topology, options, quantize, keep)
    fill(model)
    return model


def outline(
    source: WeightSource,
    topology: Topology,
    options: ModelOptions,
    quantize: Quantization | None = None,
    keep: Collection[str] = (),
) -> tuple[Model, Callable[[Model], None]]:
    """Builds a model without values, and what fills it, wrapped or not, with pairs of adapters or without.

    Args:
        source: of the weights.
        topology, options: as of ``models.built.build_model``; with ``build_on_cpu`` it stays in the CPU's memory.
        quantize: linears to keep in 4 bits; None: those that ``source`` stores so. Their weights never lie on the device in full.
        keep: global names of weights that train, and so are not quantised.

    Raises:
        ConfigError: the model does not divide over the topology, or is stored in 4 bits otherwise than asked for.
        ConversionError: the weights do not fit the model (when it is filled).
    """
    quantization, stays = agree(source, quantize, options.params_dtype), options.build_on_cpu
    if quantization is not None:
        options = dataclasses.replace(options, build_on_cpu=True)
    model = build_model(source.spec, source.config, topology, options)
    linears = {}
    if quantization is not None:
        linears = qlora.take_weights(model, source, quantization, keep)
        qlora.outline(linears, source, quantization, model)
    weights = {entry.name for entry in model.mapping}

    def fill(filled: Model) -> None:
        load_into(source, filled, {entry.name for entry in filled.mapping} - weights)
        if quantization is not None:
            qlora.fill(linears, source, quantization, filled)

    return model if stays else model.to(topology.device), fill


def load_into(source: WeightSource, model: Model, added: Collection[str] = ()) -> None:
    """Fills the parameters of this rank's stages, cast to each parameter's dtype; tied copies included.

    Args:
        source: at any layout of its own.
        model: its stages wrapped or not.
        added: global names of what it has beside the weights: left as they are. So are codes in 4 bits.

    Raises:
        ConversionError: a parameter that the source lacks, or shapes that differ; all are listed.
    """
    splits = {entry.name: entry.split for entry in model.mapping}
    tp, tp_rank = model.topology.tp, model.topology.tp_rank
    jobs: dict[str, list[nn.Parameter]] = {}
    problems = []
    for own, parameter in model.named_parameters():
        name = weight_name(own, parameter)
        if name in added or not parameter.is_floating_point():
            continue
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
