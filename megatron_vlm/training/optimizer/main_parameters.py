"""fp32 main parameters at the start of a run, as the weights have them on disk.

    source (fp32) --cast--> parameter (bf16), which megatron-core's optimizer copies: rounded
                  --fill_main--> main parameter (fp32), in place of the copy

A training checkpoint brings its own (checkpoint/tensors.py).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.log import get_logger
from megatron_vlm.models.built import Model, weight_name
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.training.optimizer.state import fragments

log = get_logger(__name__)


def fill_main(source: WeightSource, model: Model, optimizer: Any, tensors: Mapping[str, Tensor]) -> int:
    """Gives main parameters the values that weights had before they were cast, one tensor in memory at a time.

    Args:
        source: that the model was loaded from.
        model: wrapped.
        optimizer: megatron-core's, before the first update.
        tensors: full tensors that were loaded in place of the source's, by global name.

    Returns:
        Parameters of this rank whose main parameters are finer than the weights now.
    """
    splits, topology = {entry.name: entry.split for entry in model.mapping}, model.topology
    parts = {id(part.parameter): part for part in fragments(optimizer) if part.separate}
    if parts:
        source.use_main_parameters()
    number = 0
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            name, part = weight_name(own, parameter), parts.get(id(parameter))
            if part is None or name not in splits:
                continue
            if name in tensors:
                shard = splits[name].shard(tensors[name], topology.tp, topology.tp_rank)
            elif name in source.infos and source.infos[name].dtype != part.dtype:  # new pairs are in none
                shard = source.read_shard(name, splits[name], topology.tp, topology.tp_rank)
            else:
                continue
            part.set_main(shard)
            number += 1
    if number:
        log.info(
            "%d main parameters of this rank start from the weights on disk, which are finer than the model's", number
        )
    return number
