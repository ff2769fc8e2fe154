"""hf2mg and mg2hf: the two directions, each one pass over the full tensors.

hf2mg: open_source (or a family's assemble) --> write_megatron
mg2hf: open_source --> export_hf
"""

import os
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.conversion.hf_io import HFWriter, copy_hf_files
from megatron_vlm.conversion.mapping import TensorInfo
from megatron_vlm.conversion.megatron_dir import write_config, write_megatron
from megatron_vlm.conversion.safetensors_io import PARAMS_DTYPES, aligned_order, atomic_directory, cast
from megatron_vlm.conversion.source import WeightSource, open_source
from megatron_vlm.errors import ConfigError


def params_dtype(name: str | None) -> torch.dtype | None:
    """``fp32``, ``bf16``, ``fp16`` -> torch dtype; None: keep each tensor's own."""
    if name is None:
        return None
    if name not in PARAMS_DTYPES:
        raise ConfigError(f"dtype {name!r} is not one of {', '.join(PARAMS_DTYPES)}")
    return PARAMS_DTYPES[name]


def hf2mg(
    hf: str | os.PathLike,
    out: str | os.PathLike,
    *,
    family: str | None = None,
    tp: int = 1,
    pp: int = 1,
    dtype: str | None = None,
    vocab_multiple: int = 128,
    vocab_extra: int = 0,
) -> None:
    """Converts an HF directory or hub id (or weights of another layout) to Megatron weights. See ``write_megatron``."""
    with open_source(hf, family) as source:
        write_megatron(
            source,
            Path(out),
            tp=tp,
            pp=pp,
            dtype=params_dtype(dtype),
            vocab_multiple=vocab_multiple,
            vocab_extra=vocab_extra,
        )


def mg2hf(
    load: str | os.PathLike,
    out: str | os.PathLike,
    *,
    family: str | None = None,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
) -> None:
    """Converts Megatron weights or a training checkpoint to an HF directory."""
    with open_source(load, family) as source:
        export_hf(source, out, dtype=params_dtype(dtype), max_shard_size=max_shard_size)


def export_hf(
    source: WeightSource,
    out: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
) -> None:
    """Writes a source as an HF directory: sharded safetensors with index, and every other file of the original.

    Args:
        source: any weights.
        out: absent or an empty directory.
        dtype: of the written floating point tensors; None: each keeps its own.
        max_shard_size: as of transformers' ``save_pretrained``.
    """
    order = aligned_order({name: info.cast(dtype) for name, info in source.infos.items()})
    copies = {source.mapping.hf_tied[name]: name for name in source.stored_ties}
    infos: dict[str, TensorInfo] = {}
    for name, info in order.items():
        entry = source.entries[name]
        for hf_name, part in zip(entry.hf, entry.from_full(info.meta()), strict=True):
            infos[hf_name] = TensorInfo.of(part)
            if hf_name in copies:
                infos[copies[hf_name]] = infos[hf_name]
    with (
        atomic_directory(out, sum(info.nbytes for info in infos.values())) as directory,
        HFWriter(directory, infos, max_shard_size) as writer,
    ):
        for name in order:
            entry = source.entries[name]
            for hf_name, part in zip(entry.hf, entry.from_full(cast(source.read(name), dtype)), strict=True):
                writer.write(hf_name, part)
                if hf_name in copies:
                    writer.write(copies[hf_name], part)
        writer.close()
        source.check_digests()
        copy_hf_files(source.hf_dir, directory)
        write_config(directory, source.hf_config, dtype or _changed_dtype(source, infos))


def _changed_dtype(source: WeightSource, infos: dict[str, TensorInfo]) -> torch.dtype | None:
    """What config.json must say after training in another dtype than the original's; None: leave it alone."""
    dtypes = {info.dtype for info in infos.values()}
    if source.kind != "training" or len(dtypes) != 1:
        return None
    only: Any = dtypes.pop()
    named = source.hf_config.get("dtype") or source.hf_config.get("torch_dtype")
    return None if named == str(only).removeprefix("torch.") else only
