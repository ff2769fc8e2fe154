"""Adapters on disk: PEFT's folder, or XTuner's with one for each part of the model; and the base that they belong to."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_vlm.digests import LISTING, Record, check_records, listed
from megatron_vlm.errors import ConversionError
from megatron_vlm.log import get_logger
from megatron_vlm.peft.adapter import Adapter, hf_infos
from megatron_vlm.peft.adapter_io import CONFIG, is_adapter, read_adapter, unknown_modules
from megatron_vlm.peft.base_identity import base_mark, marks_apart
from megatron_vlm.peft.select import named_mapping
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.weights.hf_io import HFTensors
from megatron_vlm.weights.mapping import Mapping

log = get_logger(__name__)


def open_adapter(directory: Path, source: WeightSource, verify_hashes: bool = True) -> tuple[Adapter, str | None]:
    """Reads an adapter of a base: PEFT's folder, or XTuner's with one for each part.

    Args:
        directory: holds it.
        source: of the base.
        verify_hashes: compare its files with the digests that were written beside them, if any.

    Returns:
        The adapter, and the naming of its modules (None: the model's own).

    Raises:
        ConversionError: no adapter, one that does not fit the base, or one that was trained on another.
    """
    if verify_hashes:
        check_records(adapter_records(directory, source))
    adapter, names = _read_folders(directory, source) or _read_folder(directory, source)
    check_base(adapter, source, named_mapping(source.spec, source.config, names), directory)
    return dataclasses.replace(adapter, copies={}), names


def adapter_records(directory: Path, source: WeightSource) -> Iterator[Record]:
    """Of the folder and of those in it that belong to the adapter: the parts of the model, with an adapter or whole."""
    yield from listed(directory, ConversionError)
    for export in source.spec.exports.values() if any(directory.glob(f"*/{LISTING}")) else ():
        parts = {name.rpartition("/")[0] for name in export.mapping(source.config).hf_names()} - {""}
        for folder in sorted(parts | set((export.adapters or {}).values())):
            yield from listed(directory / folder, ConversionError)


def _namings(source: WeightSource) -> Iterator[tuple[str | None, Mapping]]:
    yield None, source.mapping
    for name, export in source.spec.exports.items():
        yield name, export.mapping(source.config)


def _read_folder(directory: Path, source: WeightSource) -> tuple[Adapter, str | None]:
    if not is_adapter(directory):
        raise ConversionError(f"{directory} holds no adapter: there is no {CONFIG}")
    # The naming that knows all of its modules; of several the model's own.
    names, mapping = min(_namings(source), key=lambda naming: unknown_modules(directory, naming[1]))
    return read_adapter(directory, mapping, source.infos), names


def _read_folders(directory: Path, source: WeightSource) -> tuple[Adapter, str] | None:
    for names, export in source.spec.exports.items():
        folders = {weights: directory / folder for weights, folder in (export.adapters or {}).items()}
        found = [
            (weights, read_adapter(path, export.mapping(source.config), source.infos, weights))
            for weights, path in folders.items()
            if is_adapter(path)
        ]
        if not found:
            continue
        mapping, adapters = export.mapping(source.config), [adapter for _, adapter in found]
        full = {name: tensor for adapter in adapters for name, tensor in adapter.full.items()}
        whole = {name.rpartition("/")[0] for name in mapping.hf_names()} - set(folders)
        for folder in sorted(whole):
            if (directory / folder).is_dir():
                full |= _read_whole(directory / folder, folder, mapping, source)
        first = adapters[0]
        dropouts = {adapter.dropout for adapter in adapters}
        joined = dataclasses.replace(
            first,
            pairs={module: pair for adapter in adapters for module, pair in adapter.pairs.items()},
            full=full,
            copies={name: tensor for adapter in adapters for name, tensor in adapter.copies.items()},
            bias=next((adapter.bias for adapter in adapters if adapter.bias != "none"), "none"),
            dropout=max(dropouts),
            base=None,
        )
        if len(dropouts) > 1:
            log.warning("%s: the adapters' dropouts differ (%s): the largest is taken", directory, sorted(dropouts))
        return joined, names
    return None


def _read_whole(directory: Path, folder: str, mapping: Mapping, source: WeightSource) -> dict[str, Tensor]:
    """A part that was trained in full, from its own folder."""
    tensors, infos = HFTensors(directory), hf_infos(mapping, source.infos)
    found = {f"{folder}/{name}": tensors.read(name) for name in tensors.infos}
    tensors.close()
    wanted = {name for name in infos if name.rpartition("/")[0] == folder}
    if found.keys() != wanted or any(tuple(found[name].shape) != infos[name].shape for name in wanted):
        shapes = ", ".join(f"{name} {list(infos[name].shape)}" for name in sorted(wanted))
        raise ConversionError(f"{directory} does not hold what the model has there: {shapes}")
    return found


def check_base(adapter: Adapter, source: WeightSource, mapping: Mapping, what: Path) -> None:
    """Checks that an adapter was trained on these weights, as far as its files tell.

    Raises:
        ConversionError: it was not.
    """
    for entry in mapping if adapter.copies else ():
        for name, part in zip(entry.hf, entry.from_full(source.read(entry.name)), strict=True):
            copy = adapter.copies.get(name)
            if copy is not None and not torch.equal(copy, part.to(copy.dtype)):
                raise ConversionError(
                    f"{what} holds a copy of the base's {name}, which differs from that of {source.hf_dir}: it was trained on "
                    "another base, or with other rows of added tokens"
                )
    if adapter.mark is None or source.quantization is not None:
        return
    apart = marks_apart(adapter.mark, base_mark(source.infos, source.read))
    if apart:
        trained_on = f" ({adapter.base})" if adapter.base else ""
        raise ConversionError(
            f"{what} was trained on another base{trained_on} than {source.hf_dir}: {apart} of {len(adapter.mark)} of its weights "
            "differ: give the one it was trained on"
        )
