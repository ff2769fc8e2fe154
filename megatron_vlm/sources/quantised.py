"""Linears of a source in 4 bits: which ones, agreed with how they are stored, and read HF tensor by HF tensor.

weights in full --read_hf--> cast --quantise, each HF tensor whole--> Nf4Tensor
stored codes    --read_nf4-----------------------------------------------------> Nf4Tensor
"""

from collections.abc import Iterable, Iterator
from collections.abc import Mapping as Dict
from typing import Any

import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.weights.mapping import Entry, Mapping, TensorInfo, group_of
from megatron_vlm.weights.nf4.tensor import Nf4Tensor, Quantization, quantise
from megatron_vlm.weights.safetensors_io import PARAMS_DTYPES

HEAD = "language_model.output_layer.weight"
"""The LM head, which stays in full, and which ``all-linear`` leaves out."""
_EMBEDDINGS = ("word_embeddings", "position_embedding")


def is_linear(name: str, info: TensorInfo) -> bool:
    """Whether a full tensor is the weight of a linear."""
    module, _, kind = name.rpartition(".")
    return kind == "weight" and len(info.shape) == 2 and module.rpartition(".")[2] not in _EMBEDDINGS


def quantised_names(mapping: Mapping, infos: Dict[str, TensorInfo], groups: Iterable[str]) -> set[str]:
    """Global names of the linears' weights of whole parts of the model, the LM head left out."""
    groups = set(groups)
    return {
        entry.name
        for entry in mapping
        if is_linear(entry.name, infos[entry.name]) and entry.name != HEAD and group_of(entry.name) in groups
    }


def agree(source: WeightSource, wanted: Quantization | None, dtype: str) -> Quantization | None:
    """How the linears of a run are quantised: as the weights are stored, else as is wanted.

    Args:
        source: of the weights.
        wanted: by the run's config.
        dtype: of the run: fp32, bf16 or fp16.

    Raises:
        ConfigError: stored otherwise than the run needs.
    """
    stored = source.quantization
    if stored is None:
        return wanted
    if stored.dtype != dtype:
        raise ConfigError(
            f"the 4-bit weights were quantised from {stored.dtype}, the run computes in {dtype}: set the run's precision to "
            f"{stored.dtype}, or make them again with `convert hf2mg --quantize nf4 --dtype {dtype}`"
        )
    if wanted is not None and wanted != stored:
        ours, theirs = wanted.to_dict(), stored.to_dict()
        differing = ", ".join(
            f"{key} {ours[key]!r} against {theirs[key]!r}"
            for key in ours
            if key != "backend" and ours[key] != theirs[key]
        )
        raise ConfigError(
            f"the run's settings differ from those that the 4-bit weights were made with: {differing}; set them alike, or "
            "leave peft.quantize out, which takes what is stored"
        )
    return stored


def nf4_tensors(source: WeightSource, entry: Entry, quantization: Quantization, device: Any) -> Iterator[Nf4Tensor]:
    """The HF tensors of an entry in NF4, one at a time: as stored, or quantised on ``device`` after the cast."""
    if source.quantization is not None:
        for stored in source.read_nf4(entry):
            yield stored.to(device)
        return
    for pieces in source.read_hf(entry):
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        on_device = tensor.to(PARAMS_DTYPES[quantization.dtype]).to(device)
        yield quantise(on_device, double=quantization.double_quant)
