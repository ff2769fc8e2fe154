"""Writing Megatron weights (weights/megatron_dir.py): one pass over the full tensors, all files open at once.

WeightSource --Split.pieces, or NF4 of whole HF tensors--> mp_rank_TT_PPP/, nf4_PPP/, hf/, megatron.json
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megatron_vlm.digests import SEAL, Hashing, sealed
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.files import check_output, file_digest, write_json
from megatron_vlm.sources.hf import HFSource
from megatron_vlm.sources.quantised import agree, nf4_tensors, quantised_names
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.weights.hf_io import write_config
from megatron_vlm.weights.mapping import Entry, Mapping, TensorInfo
from megatron_vlm.weights.megatron_dir import MANIFEST, FileEntry, Manifest, Stages, rank_file
from megatron_vlm.weights.model_folder import copy_hf_files
from megatron_vlm.weights.nf4.files import nf4_file, part_infos, stored_parts
from megatron_vlm.weights.nf4.tensor import Quantization
from megatron_vlm.weights.safetensors_io import (
    PARAMS_DTYPES,
    SafetensorsWriter,
    Writers,
    aligned_order,
    atomic_directory,
    cast,
)


def write_megatron(
    source: WeightSource,
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
    mapping = source.spec.mapping(source.config, tp).padded(vocab_multiple, vocab_extra)
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
    read_from = source.file_names() if isinstance(source, HFSource) else []
    origin = Hashing(source.hf_dir, read_from, ConversionError)
    with origin, atomic_directory(out, need) as directory, Writers() as writers:
        for file, plan in plans.items():
            (directory / file).parent.mkdir()
            writers.open[file] = SafetensorsWriter(directory / file, plan, {"format": "pt"})
        for name in order:
            stage = stages.of(name)
            for rank, pieces in enumerate(_shards(source, entries[name], tp)):
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


def _shards(source: WeightSource, entry: Entry, tp: int) -> list[list[Tensor]]:
    """Every rank's shard, as ``entry.split`` cuts it, in pieces along dim 0: nothing is copied without need."""
    split = entry.split
    if entry.cut_by_rows and not split.pads:  # the full tensor is never built
        parts = [pieces[0] if len(pieces) == 1 else torch.cat(pieces) for pieces in source.read_hf(entry)]
        return [[part.chunk(tp)[rank] for part in parts] for rank in range(tp)]
    full = source.read(entry.name)
    if split.dim == 0:
        return [split.pieces(full, tp, rank) for rank in range(tp)]
    return [[split.shard(full, tp, rank)] for rank in range(tp)]


class Nf4Writer:
    """What ``write_megatron`` writes in 4 bits.

    Args:
        source: of the weights.
        mapping: of its family.
        stages: which stage stores which entry.
        quantize: as is wanted; None: as the source is stored.
        dtype: that the rest is written in; None: its own.

    Attributes:
        quantization: what is done; None: nothing.
        names: global names of the entries that are so written.
        nbytes: of all of them.

    Raises:
        ConfigError: the source is stored in 4 bits in another way.
    """

    def __init__(
        self,
        source: WeightSource,
        mapping: Mapping,
        stages: Stages,
        quantize: Quantization | None,
        dtype: torch.dtype | None,
    ):
        self.source, self.quantization = source, quantize or source.quantization
        self.names: set[str] = set()
        self.nbytes = 0
        self._plans: dict[int, dict[str, list[tuple[str, tuple[int, ...]]]]] = {}
        if self.quantization is None:
            return
        names = [name for name, known in PARAMS_DTYPES.items() if known == dtype]
        agree(source, quantize, names[0] if names else self.quantization.dtype)
        self.names = quantised_names(mapping, source.infos, self.quantization.groups)
        if not self.names:
            raise ConversionError(f"the model has no linears in {', '.join(self.quantization.groups)} to quantise")
        for entry in mapping:
            if entry.name in self.names:
                shapes = [tuple(part.shape) for part in entry.from_full(source.infos[entry.name].meta())]
                self._plans.setdefault(stages.of(entry.name), {})[entry.name] = list(zip(entry.hf, shapes))
        self.nbytes = sum(
            info.nbytes for plan in self._plans.values() for info in self._infos(_tensors(plan.values())).values()
        )

    def write(self, directory: Path, writers: Writers) -> None:
        """Quantises and writes, one HF tensor at a time; on a GPU where there is one, as training would."""
        if self.quantization is None:
            return
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.source.quantization is None:
            self.quantization = self.quantization.replace(backend="bitsandbytes")
        entries = self.source.mapping.by_name()
        for stage, plan in self._plans.items():
            path = directory / nf4_file(stage)
            path.parent.mkdir()
            tensors = _tensors(plan.values())
            metadata = {"format": "pt", **{hf: json.dumps(shape) for hf, shape in tensors}}
            writer = writers.open[nf4_file(stage)] = SafetensorsWriter(path, self._infos(tensors), metadata)
            for name in plan:
                parts = nf4_tensors(self.source, entries[name], self.quantization, device)
                for (hf, _), tensor in zip(plan[name], parts, strict=True):
                    for part, values in stored_parts(tensor).items():
                        writer.write(f"{hf}.{part}", values.cpu())

    def _infos(self, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
        assert self.quantization is not None
        double = self.quantization.double_quant
        return {f"{hf}.{part}": info for hf, shape in tensors for part, info in part_infos(shape, double).items()}


def _tensors(plans: Iterable[list[tuple[str, tuple[int, ...]]]]) -> list[tuple[str, tuple[int, ...]]]:
    return [tensor for plan in plans for tensor in plan]
