"""Megatron weights on disk, and how they are written: one pass over the full tensors, all files open at once.

    OUT/megatron.json                      format, family, configs, tp, pp, vocabulary, size and sha256 of each file
    OUT/mp_rank_TT_PPP/model.safetensors   shards of tensor parallel rank TT on pipeline stage PPP, under global names
    OUT/nf4_PPP/model.safetensors          linears of stage PPP in 4 bits, HF tensor by HF tensor, whole (conversion/nf4_files.py)
    OUT/hf/                                every non-weight file of the source (config, tokenizer, processor ...)

Stages: decoder layer i of L lies on stage i // (L / pp); final norm and output layer on the last; everything else
(embedding, tower, connector) on the first. The output copy of a tied embedding is not stored.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_vlm.config import Config
from megatron_vlm.digests import SEAL, Hashing, Record, check_seal, sealed
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.files import check_output, file_digest, read_json, write_json
from megatron_vlm.weights.mapping import TensorInfo
from megatron_vlm.weights.model_folder import copy_hf_files
from megatron_vlm.weights.nf4 import Quantization
from megatron_vlm.weights.safetensors_io import (
    SafetensorsWriter,
    Writers,
    aligned_order,
    atomic_directory,
    cast,
)

if TYPE_CHECKING:
    from megatron_vlm.conversion.source import WeightSource

MANIFEST = "megatron.json"
FORMAT = "megatron_vlm"
FORMAT_VERSION = 1
_LAYER = re.compile(r"language_model\.decoder\.layers\.(\d+)\.")
_LAST_STAGE = ("language_model.decoder.final_layernorm.", "language_model.output_layer.")


@dataclass(frozen=True, kw_only=True)
class FileEntry(Config):
    """Size in bytes and digest of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest(Config):
    """Content of ``megatron.json``.

    Attributes:
        num_layers: decoder layers.
        vocab_size, padded_vocab_size: true rows of the vocabulary, and rows stored over all tensor parallel ranks.
        stored_ties: HF names of tied copies that the source had stored, which an export writes again.
        model_config: the family's resolved model config, for readers; ``hf/config.json`` is what counts.
        quantization: how linears are stored in 4 bits; None: all is stored in full.
        source_files: of the HF directory it was made from, name -> size and digest; None: it was made from something else.
        files: path relative to the directory -> size and digest.
        digest: of all of this, so that a changed value is noticed.
    """

    format: str = FORMAT
    version: int = FORMAT_VERSION
    family: str
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    num_layers: int
    vocab_size: int
    padded_vocab_size: int
    make_vocab_size_divisible_by: int
    extra_vocab_size: int
    stored_ties: tuple[str, ...] = ()
    hf_config_sha256: str
    model_config: dict[str, Any]
    quantization: Quantization | None = None
    source_files: dict[str, FileEntry] | None = None
    files: dict[str, FileEntry]
    digest: str | None = None

    def record(self, directory: Path) -> Record:
        """The files that must be there."""
        files = {name: entry.to_dict() for name, entry in self.files.items()}
        return Record(folder=directory, source=MANIFEST, files=files, error=ConversionError)


def rank_file(tp_rank: int, stage: int) -> str:
    """Path of one rank's file inside the directory."""
    return f"mp_rank_{tp_rank:02d}_{stage:03d}/model.safetensors"


class Stages:
    """Which pipeline stage stores which tensor.

    Raises:
        ConfigError: the decoder's layers do not divide by ``pp``; with the sizes that do.
    """

    def __init__(self, names: Iterable[str], pp: int):
        numbers = [int(match[1]) for name in names if (match := _LAYER.match(name))]
        self.num_layers = max(numbers, default=-1) + 1
        if pp < 1 or self.num_layers % pp:
            legal = ", ".join(str(size) for size in range(1, self.num_layers + 1) if self.num_layers % size == 0)
            raise ConfigError(
                f"pipeline parallel size {pp} does not divide {self.num_layers} decoder layers: use one of {legal}"
            )
        self.pp = pp

    def of(self, name: str) -> int:
        """Stage of a full tensor."""
        if match := _LAYER.match(name):
            return int(match[1]) // (self.num_layers // self.pp)
        return self.pp - 1 if name.startswith(_LAST_STAGE) else 0


def write_megatron(
    source: "WeightSource",
    out: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    dtype: torch.dtype | None = None,
    vocab_multiple: int = 128,
    vocab_extra: int = 0,
    quantize: Quantization | None = None,
) -> None:
    """Writes a source as Megatron weights for ``tp`` x ``pp`` ranks, in this one process.

    Args:
        source: where tensors, configs and the other files come from.
        out: absent or an empty directory.
        dtype: of the written floating point tensors; None: each keeps its own.
        vocab_multiple: the vocabulary is padded with zero rows to a multiple of this times tp.
        vocab_extra: zero rows added before that padding. Padded rows are never exported.
        quantize: linears to store in 4 bits; None: those that the source stores so.

    Raises:
        ConfigError: the model does not divide over the layout; with the sizes that work.
        ConversionError: a tensor does not fit, or the disk does not.
    """
    if vocab_multiple < 1 or vocab_extra < 0:
        raise ConfigError(
            "--make-vocab-size-divisible-by must be at least 1 and --extra-vocab-size at least 0, "
            f"got {vocab_multiple} and {vocab_extra}"
        )
    from megatron_vlm.conversion.nf4_files import Nf4Writer

    mapping = source.spec.mapping(source.config, tp=tp, vocab_multiple=vocab_multiple, vocab_extra=vocab_extra)
    entries = mapping.by_name()
    splits = {entry.name: entry.split for entry in mapping}
    stages = Stages(splits, pp)
    nf4 = Nf4Writer(source, mapping, stages, quantize, dtype)
    order = aligned_order({name: source.infos[name].cast(dtype) for name in splits if name not in nf4.names})
    plans: dict[str, dict[str, TensorInfo]] = {rank_file(t, p): {} for p in range(pp) for t in range(tp)}
    for name, info in order.items():
        try:
            shard = TensorInfo.of(splits[name].shard(info.meta(), tp, 0))
        except ConversionError as error:
            raise ConversionError(f"{name}: {error}") from error
        for t in range(tp):
            plans[rank_file(t, stages.of(name))][name] = shard
    need = nf4.nbytes + sum(info.nbytes for plan in plans.values() for info in plan.values())
    check_output(out, source.folders(), "--out", ConversionError)
    source.hash_as_read()
    origin = Hashing(source.hf_dir, source.hf_file_names(), ConversionError)
    with origin, atomic_directory(out, need) as directory, Writers() as writers:
        for file, plan in plans.items():
            (directory / file).parent.mkdir()
            writers.open[file] = SafetensorsWriter(directory / file, plan, {"format": "pt"})
        for name in order:
            stage = stages.of(name)
            for rank, pieces in enumerate(source.read_shards(entries[name], tp)):
                writers.open[rank_file(rank, stage)].write(name, *(cast(piece, dtype) for piece in pieces))
            del pieces  # else two of the largest tensors would be held at a time
        nf4.write(directory, writers)
        files = writers.close()
        source.check_digests()
        copy_hf_files(source.hf_dir, directory / "hf")
        write_config(directory / "hf", source.hf_config, dtype)
        for path in sorted((directory / "hf").rglob("*")):
            if path.is_file():
                files[path.relative_to(directory).as_posix()] = file_digest(path, ConversionError)
        manifest = Manifest(
            family=source.spec.name,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            num_layers=stages.num_layers,
            vocab_size=mapping.vocab_size,
            padded_vocab_size=max(split.padded(mapping.vocab_size, tp) for split in splits.values()),
            make_vocab_size_divisible_by=vocab_multiple,
            extra_vocab_size=vocab_extra,
            stored_ties=tuple(source.stored_ties),
            hf_config_sha256=files["hf/config.json"]["sha256"],
            model_config=source.config.to_dict(),
            quantization=nf4.quantization,
            source_files={n: FileEntry(**entry) for n, entry in origin.result().items()} or source.source_files,
            files={name: FileEntry(**entry) for name, entry in files.items()},
        )
        values = {key: value for key, value in manifest.to_dict().items() if key != SEAL}
        write_json(directory / MANIFEST, sealed(values))


def write_config(hf_dir: Path, hf_config: dict[str, Any], dtype: torch.dtype | None) -> None:
    """Rewrites the copied config.json where ``hf_config`` differs from it, or where ``dtype`` changes what it says."""
    config = dict(hf_config)
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(dtype).removeprefix("torch.")
    path = hf_dir / "config.json"
    if not path.exists() or read_json(path, ConversionError) != config:
        hf_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, config)


def read_manifest(directory: Path) -> Manifest:
    """Reads ``megatron.json`` and checks the sizes of the files that it names.

    Raises:
        ConversionError: another format or version, or a file absent or of another size.
    """
    data = read_json(directory / MANIFEST, ConversionError)
    if (data.get("format"), data.get("version")) != (FORMAT, FORMAT_VERSION):
        raise ConversionError(
            f"{directory / MANIFEST} says format {data.get('format')!r} version {data.get('version')!r}; "
            f"this program reads {FORMAT!r} version {FORMAT_VERSION}"
        )
    try:
        manifest = Manifest.from_dict(data, MANIFEST)
    except ConfigError as error:
        raise ConversionError(f"{directory / MANIFEST}: {error}") from error
    check_seal(data, directory / MANIFEST, ConversionError, required=False)
    manifest.record(directory).check_sizes()
    return manifest


def check_hf_files(record: Record) -> None:
    """Compares the files in ``hf/`` of Megatron weights or a training checkpoint with their digests: they are small.

    Raises:
        MegatronVLMError: one was changed.
    """
    record.check_digests([name for name in record.files if name.startswith("hf/")])
