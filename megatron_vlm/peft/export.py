"""Writing adapters: ``convert mg2hf --adapter-only`` and, of XTuner's form, its folders.

MergedSource --renamed (adapter.py)--> Adapter in the wanted naming --write_adapter--> OUT/adapter_config.json
                                                                                      OUT/adapter_model.safetensors
                                                                                      OUT/tokenizer and processor files
                                                      OUT/megatron_vlm_files.json, their digests
"""

import copy
import dataclasses
import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Mapping as Dict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.digests import write_listing
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.files import check_output, read_json
from megatron_vlm.log import get_logger
from megatron_vlm.peft.adapter import Adapter, Pair, hf_infos, renamed
from megatron_vlm.peft.adapter_io import write_adapter
from megatron_vlm.peft.base_identity import base_mark, marks_apart
from megatron_vlm.peft.merge import MergedSource, absolute
from megatron_vlm.sources.source import WeightSource, other_naming
from megatron_vlm.weights.hf_io import CONFIG_NAME, HFTensors, HFWriter, list_names
from megatron_vlm.weights.mapping import Mapping, TensorInfo
from megatron_vlm.weights.safetensors_io import atomic_directory, cast

_BESIDE = (
    "tokenizer*", "special_tokens_map*", "added_tokens*", "vocab*", "merges*", "chat_template*", "*processor_config*",
    "processor_config*", "tokenization_*.py", "processing_*.py", "image_processing_*.py", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""Files that an adapter is used with; its base has the others."""
_VOCABULARY = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")


def export_adapter(
    source: WeightSource,
    out: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    naming: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the adapter of a source for PEFT, with tokenizer and processor files beside it.

    Args:
        source: a base with an adapter.
        out: absent or an empty directory.
        base: HF model to be named as the base (directory or hub id), in the adapter's naming; None: the one it was trained on.
            With fewer rows in its vocabulary, as before tokens were added, embedding and head are written along.
        naming: one of the family's exports; None: the model's own.
        dtype: of what is written; None: as trained.

    Raises:
        ConfigError: nothing was adapted, or a naming that the family does not offer.
        ConversionError: no base to name, or another model.
    """
    if not isinstance(source, MergedSource):
        raise ConfigError(f"--adapter-only: {source.hf_dir} holds a whole model, and no adapter")
    check_output(out, source.folders(), "--out", ConversionError)
    export = other_naming(source, naming)
    names, mapping = (naming, export.mapping(source.config)) if export else (None, source.mapping)
    adapter = source.adapter
    if names != source.naming:
        adapter = renamed(adapter, source.named, mapping, source.base.infos, source.base.read)
    name = _base_name(source, names, base)
    parts = export.adapters if export is not None else None
    if base is not None and Path(base).is_dir() and parts is None:
        adapter = _with_added_rows(adapter, source, mapping, Path(base))
    _tell_of_positions(source)
    mark = base_mark(source.base.infos, source.base.read) if source.quantization is None else None
    adapter = _cast(dataclasses.replace(adapter, mark=mark, base=name), dtype)
    with atomic_directory(out) as directory, tempfile.TemporaryDirectory(prefix="megatron_vlm_") as work:
        files = Path(work)
        if export is None:
            files, hf_config = source.hf_dir, source.hf_config
        else:
            for folder in {hf.rpartition("/")[0] for hf in mapping.hf_names()}:
                (files / folder).mkdir(exist_ok=True)
            export.files(source.hf_dir, copy.deepcopy(source.hf_config), files)
            hf_config = read_json(files / CONFIG_NAME, ConversionError)
        if parts is not None:
            _write_parts(directory, adapter, mapping, parts, files, source)
        else:
            write_adapter(directory, adapter, mapping, base=name, hf_config=hf_config)
        copy_beside(files, directory)
        for listed in (directory, *(path for path in directory.iterdir() if path.is_dir())):
            write_listing(listed)


def _tell_of_positions(source: MergedSource) -> None:
    """The positions that a run stretched stand in no adapter's files."""
    text = source.config.text
    if text.rope_scaling is None or source.hf_config == read_json(source.hf_dir / CONFIG_NAME, ConversionError):
        return
    scaling = {key: value for key, value in text.rope_scaling.to_dict().items() if value is not None}
    get_logger(__name__).warning(
        "the adapter was trained with RoPE scaled to %d positions, which no adapter can say: load its base with rope_scaling %s "
        "and that max_position_embeddings in config.json, or write the merged model (--merge)",
        text.max_position_embeddings,
        json.dumps(scaling),
    )


def copy_beside(source: Path, directory: Path) -> None:
    """Copies tokenizer, processor and licence files, but no config of the model."""
    for path in sorted(source.iterdir()):
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in _BESIDE):
            shutil.copyfile(path, directory / path.name)


def _base_name(source: MergedSource, names: str | None, base: str | os.PathLike | None) -> str:
    """What the base is called in the adapter's config."""
    if base is not None:
        return absolute(base)
    if names is not None:
        raise ConversionError(
            f"--as {names}: an adapter names a base of its own layout: give the model in that layout with --base DIR (or its hub "
            "id); convert mg2hf --as writes one"
        )
    if source.base.kind != "hf" or source.base_name is None:
        raise ConversionError(
            f"the base of {source.directory} is no Hugging Face directory that PEFT could load: give the model that it came from "
            "with --base DIR (or its hub id); convert mg2hf writes one"
        )
    return str(source.base_name)


def _with_added_rows(adapter: Adapter, source: MergedSource, mapping: Mapping, base: Path) -> Adapter:
    """Checks the model that is to be named, under the names of ``mapping``, and takes along rows that it lacks.

    Raises:
        ConversionError: it is another model.
    """
    tensors = HFTensors(base)
    try:
        found = {mapping.hf_aliases(name): name for name in tensors.infos}
        ours = hf_infos(mapping, source.base.infos)
        missing = sorted(set(ours) - set(found))
        apart = (
            {}
            if missing
            else {n: tensors.infos[found[n]].shape for n in ours if tensors.infos[found[n]].shape != ours[n].shape}
        )
        rows = {name for entry in mapping if entry.name in _VOCABULARY for name in entry.hf}
        if missing or not rows >= apart.keys():
            shapes = (f"{name} is {list(shape)}, not {list(ours[name].shape)}" for name, shape in apart.items())
            lacks = (f"it has no {name}" for name in missing)
            raise ConversionError(
                f"--base {base} is another model than the adapter's: {list_names([*lacks, *shapes], 3)}"
            )
        if any(shape[0] > ours[name].shape[0] for name, shape in apart.items()):
            raise ConversionError(
                f"--base {base} has more rows in its vocabulary than the model that the adapter was trained on"
            )
        entries = mapping.by_name()

        def read(name: str) -> Tensor:
            return entries[name].to_full([tensors.read(found[hf]) for hf in entries[name].hf])

        if marks_apart(base_mark(source.base.infos, read), base_mark(source.base.infos, source.base.read)):
            raise ConversionError(f"--base {base} has other weights than the model that the adapter was trained on")
    finally:
        tensors.close()
    copies: dict[str, Tensor] = {}
    for entry in mapping:
        if not apart.keys().isdisjoint(entry.hf):
            parts = zip(entry.hf, entry.from_full(source.base.read(entry.name)), strict=True)
            copies |= {hf: part for hf, part in parts if hf not in adapter.full}
    return dataclasses.replace(adapter, copies=copies)


def _cast(adapter: Adapter, dtype: torch.dtype | None) -> Adapter:
    pairs = {
        module: Pair(a=cast(pair.a, dtype), b=cast(pair.b, dtype), alpha=pair.alpha, rslora=pair.rslora)
        for module, pair in adapter.pairs.items()
    }
    full = {name: cast(tensor, dtype) for name, tensor in adapter.full.items()}
    return dataclasses.replace(adapter, pairs=pairs, full=full)


def _write_parts(
    directory: Path, adapter: Adapter, mapping: Mapping, adapters: Dict[str, str], files: Path, source: MergedSource
) -> None:
    """An adapter for each part of the model, and the other parts whole, as trained or as they were."""
    for part, folder in adapters.items():
        if not any(module.rpartition("/")[0] == part for module in (*adapter.pairs, *adapter.full)):
            continue
        config: dict[str, Any] = read_json(files / part / CONFIG_NAME, ConversionError)
        (directory / folder).mkdir()
        base = Path(str(adapter.base), part)
        name = str(base) if not part or base.is_dir() else None  # XTuner is told the tower's place when it loads
        write_adapter(directory / folder, adapter, mapping, base=name, hf_config=config, folder=part)
    whole: dict[str, dict[str, Tensor]] = {}
    for entry in mapping:
        for name in entry.hf:
            part, _, tensor = name.rpartition("/")
            if part not in adapters:
                parts = dict(zip(entry.hf, entry.from_full(source.read(entry.name)), strict=True))
                whole.setdefault(part, {})[tensor] = parts[name]
    for part, tensors in whole.items():
        (directory / part).mkdir()
        for path in (files / part).iterdir():
            shutil.copyfile(path, directory / part / path.name)
        infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
        with HFWriter(directory / part, infos) as writer:
            for key, value in tensors.items():
                writer.write(key, value)
            writer.close()
