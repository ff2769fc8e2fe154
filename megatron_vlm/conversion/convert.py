"""hf2mg and mg2hf: the two directions, each one pass over the full tensors.

hf2mg: open_source (or a family's assemble) --> write_megatron
mg2hf: open_source --> export_hf
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.conversion.hf_io import HFWriter, copy_hf_files, resolve_directory
from megatron_vlm.conversion.mapping import TensorInfo
from megatron_vlm.conversion.megatron_dir import write_config, write_megatron
from megatron_vlm.conversion.safetensors_io import PARAMS_DTYPES, aligned_order, atomic_directory, cast
from megatron_vlm.conversion.source import HFSource, WeightSource, open_hf, open_source
from megatron_vlm.errors import ConfigError
from megatron_vlm.models import registry


def params_dtype(name: str | None) -> torch.dtype | None:
    """``fp32``, ``bf16``, ``fp16`` -> torch dtype; None: keep each tensor's own."""
    if name is None:
        return None
    if name not in PARAMS_DTYPES:
        raise ConfigError(f"dtype {name!r} is not one of {', '.join(PARAMS_DTYPES)}")
    return PARAMS_DTYPES[name]


@contextlib.contextmanager
def open_model(
    hf: str | os.PathLike | None,
    *,
    family: str | None = None,
    llm: str | os.PathLike | None = None,
    vision: str | os.PathLike | None = None,
    end_of_utterance: bool = False,
    assemble: dict[str, Any] | None = None,
) -> Iterator[WeightSource]:
    """Opens a whole model, or one assembled from ``llm`` and ``vision``; directories or hub ids.

    Args:
        hf: an HF model, or weights of another layout.
        family: needed for assembling; else told by the config.
        llm, vision: parts, instead of ``hf``.
        end_of_utterance: add ``<end_of_utterance>`` where the vocabulary lacks it.
        assemble: the family's options for new parts (seed, image_size ...).

    Raises:
        ConfigError: a combination that says nothing, or an option that the family does not offer.
        ConversionError: parts that do not fit.
    """
    parts = llm is not None or vision is not None
    if (hf is not None) == parts or (parts and (llm is None or vision is None)):
        raise ConfigError("give either --hf DIR, or both --llm DIR and --vision DIR to assemble a model from")
    with tempfile.TemporaryDirectory(prefix="megatron_vlm_") as files, contextlib.ExitStack() as stack:
        if llm is not None and vision is not None:
            offered = [name for name in registry.FAMILIES if registry.get(name).assemble]
            spec = registry.get(family) if family else None
            if spec is None or spec.assemble is None:
                raise ConfigError(f"--llm and --vision need --family {' or '.join(offered)}, got {family}")
            llm_model = open_hf(resolve_directory(llm))
            stack.callback(llm_model.tensors.close)
            vision_model = open_hf(resolve_directory(vision))
            stack.callback(vision_model.tensors.close)
            yield HFSource(spec.assemble(llm_model, vision_model, Path(files), assemble or {}), spec)
            return
        assert hf is not None
        source = stack.enter_context(open_source(hf, family))
        if end_of_utterance:
            if not isinstance(source, HFSource) or source.spec.add_end_of_utterance is None:
                raise ConfigError(f"--end-of-utterance needs an HF model of a family with that token; {hf} is another")
            copy_hf_files(source.hf_dir, files)
            extended = source.spec.add_end_of_utterance(source.model, Path(files), assemble or {})
            source = HFSource(extended, source.spec)
        yield source


def hf2mg(
    hf: str | os.PathLike | None,
    out: str | os.PathLike,
    *,
    family: str | None = None,
    llm: str | os.PathLike | None = None,
    vision: str | os.PathLike | None = None,
    end_of_utterance: bool = False,
    assemble: dict[str, Any] | None = None,
    tp: int = 1,
    pp: int = 1,
    dtype: str | None = None,
    vocab_multiple: int = 128,
    vocab_extra: int = 0,
) -> None:
    """Converts a model (see ``open_model``) to Megatron weights (see ``write_megatron``)."""
    with open_model(
        hf, family=family, llm=llm, vision=vision, end_of_utterance=end_of_utterance, assemble=assemble
    ) as source:
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
            _write_parts(source, name, dtype, writer, copies)
        writer.close()
        source.check_digests()
        copy_hf_files(source.hf_dir, directory)
        write_config(directory, source.hf_config, dtype or _changed_dtype(source, infos))


def _write_parts(
    source: WeightSource, name: str, dtype: torch.dtype | None, writer: HFWriter, copies: dict[str, str]
) -> None:
    entry = source.entries[name]
    for hf_name, pieces in zip(entry.hf, source.read_hf_pieces(entry), strict=True):
        pieces = [cast(piece, dtype) for piece in pieces]
        writer.write(hf_name, *pieces)
        if hf_name in copies:
            writer.write(copies[hf_name], *pieces)


def _changed_dtype(source: WeightSource, infos: dict[str, TensorInfo]) -> torch.dtype | None:
    """What config.json must say after training in another dtype than the original's; None: leave it alone."""
    dtypes = {info.dtype for info in infos.values()}
    if source.kind != "training" or len(dtypes) != 1:
        return None
    only: Any = dtypes.pop()
    named = source.hf_config.get("dtype") or source.hf_config.get("torch_dtype")
    return None if named == str(only).removeprefix("torch.") else only
