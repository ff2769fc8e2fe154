"""Megatron weights (weights/megatron_dir.py) as a weight source: shards of any tp and pp, merged tensor by tensor."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megatron_vlm import registry
from megatron_vlm.digests import Record
from megatron_vlm.errors import ConversionError
from megatron_vlm.files import read_json
from megatron_vlm.registry import FamilySpec
from megatron_vlm.sources.config_sizes import check_sizes
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.weights.hf_io import CONFIG_NAME, list_names
from megatron_vlm.weights.mapping import Entry, Split, TensorInfo
from megatron_vlm.weights.megatron_dir import MANIFEST, Stages, check_hf_files, rank_file, read_manifest
from megatron_vlm.weights.model_folder import check_model_folder
from megatron_vlm.weights.nf4.files import Nf4Reader, nf4_file
from megatron_vlm.weights.nf4.tensor import Nf4Tensor
from megatron_vlm.weights.safetensors_io import SafetensorsFile


class MegatronSource(WeightSource):
    """Megatron weights of any tp and pp (megatron_dir.py); sizes, and digests of ``hf/``, are checked when it is opened.

    Raises:
        ConversionError: files missing, damaged, or not holding what the family needs.
    """

    kind = "megatron"

    def __init__(self, directory: Path, spec: FamilySpec | None = None, *, verify_hashes: bool = True):
        self.directory = directory
        self.manifest = read_manifest(directory)
        if verify_hashes:
            check_hf_files(self.manifest.record(directory))
        hf_dir = directory / "hf"
        check_model_folder(hf_dir)
        super().__init__(
            hf_dir, read_json(hf_dir / CONFIG_NAME, ConversionError), spec or registry.get(self.manifest.family)
        )
        self.stored_ties, self.source_files = self.manifest.stored_ties, self.manifest.source_files
        self.tp, self.pp = self.manifest.tensor_model_parallel_size, self.manifest.pipeline_model_parallel_size
        padding = self.manifest.make_vocab_size_divisible_by, self.manifest.extra_vocab_size
        self._splits = {e.name: e.split for e in self.spec.mapping(self.config, self.tp).padded(*padding)}
        self._stages = Stages(self._splits, self.pp)
        self._files: dict[tuple[int, int], SafetensorsFile] = {}
        self._nf4: Nf4Reader | None = None
        self.quantization = self.manifest.quantization
        try:
            if self.quantization is not None:
                self._nf4 = Nf4Reader(directory, self.pp, self.quantization)
            self._in_nf4 = self._check_nf4()
            for stage in range(self.pp):
                for rank in range(self.tp):
                    self._files[rank, stage] = SafetensorsFile(directory / rank_file(rank, stage))
            self._check_names()
            self.infos = self._full_infos()
            check_sizes(self.config, self.infos, str(directory))
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> Tensor:
        self._require_full(name)
        try:
            return self._splits[name].merge(self._read_all(name), self.mapping.vocab_size)
        except ConversionError as error:
            raise ConversionError(f"{self.directory}: {name}: {error}") from error

    def read_hf(self, entry: Entry) -> Iterator[list[Tensor]]:
        split = self._splits[entry.name]
        if not entry.cut_by_rows or split.dim is None:
            yield from super().read_hf(entry)
            return
        self._require_full(entry.name)
        rows = self.mapping.vocab_size
        for pieces in zip(*(shard.chunk(split.stride) for shard in self._read_all(entry.name)), strict=True):
            if split.pads:
                yield [p[: rows - i * len(p)] for i, p in enumerate(pieces) if i * len(p) < rows]
            else:
                yield list(pieces)

    def read_shard(self, name: str, split: Split, tp: int, tp_rank: int) -> Tensor:
        self._require_full(name)
        if tp == self.tp and split == self._splits[name]:
            return self._files[tp_rank, self._stages.of(name)].read(name)
        return super().read_shard(name, split, tp, tp_rank)

    def read_nf4(self, entry: Entry) -> Iterator[Nf4Tensor]:
        if self._nf4 is None or entry.name not in self._in_nf4:
            return super().read_nf4(entry)
        return map(self._nf4.read, entry.hf)

    def folders(self) -> tuple[Path, ...]:
        return (self.directory,)

    def records(self) -> tuple[Record, ...]:
        hashed = {name: file.sha256 for name, file in self._named_files().items()}
        return (dataclasses.replace(self.manifest.record(self.directory), hashed=hashed),)

    def hash_as_read(self) -> None:
        for file in self._named_files().values():
            file.hash_as_read()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self._nf4 is not None:
            self._nf4.close()

    def _named_files(self) -> dict[str, SafetensorsFile]:
        files = {rank_file(rank, stage): file for (rank, stage), file in self._files.items()}
        return files | {nf4_file(stage): file for stage, file in (self._nf4.files if self._nf4 else {}).items()}

    def _require_full(self, name: str) -> None:
        if name in self._in_nf4:
            self.require_full(f"reading {name}")

    def _check_nf4(self) -> set[str]:
        """Names of the entries whose HF tensors lie in 4 bits, all of them or none."""
        if self._nf4 is None:
            return set()
        found, left = set(), set(self._nf4.shapes)
        for entry in self.mapping:
            mine = left & set(entry.hf)
            if mine and mine != set(entry.hf):
                raise ConversionError(
                    f"{self.directory}: of {entry.name}, only {list_names(sorted(mine))} is there in 4 bits"
                )
            left -= mine
            if mine:
                found.add(entry.name)
        if left:
            raise ConversionError(
                f"{self.directory}: 4-bit tensors that family {self.spec.name} does not have: {list_names(sorted(left))}"
            )
        return found

    def _read_all(self, name: str) -> list[Tensor]:
        stage = self._stages.of(name)
        return [self._files[rank, stage].read(name) for rank in range(self.tp)]

    def _check_names(self) -> None:
        for (_, stage), file in self._files.items():
            wanted = {name for name in self._splits if self._stages.of(name) == stage} - self._in_nf4
            missing, extra = sorted(wanted - set(file.infos)), sorted(set(file.infos) - wanted)
            if missing or extra:
                raise ConversionError(
                    f"{file.path} does not hold stage {stage} of {self.pp} of family {self.spec.name}: "
                    f"missing {list_names(missing) or 'nothing'}; unexpected {list_names(extra) or 'nothing'}"
                )

    def _full_infos(self) -> dict[str, TensorInfo]:
        infos = {}
        for name, split in self._splits.items():
            if self._nf4 is not None and name in self._in_nf4:
                parts = [self._nf4.info(hf).meta() for hf in self.entries[name].hf]
                infos[name] = TensorInfo.of(self.entries[name].to_full(parts))
                continue
            stage = self._stages.of(name)
            shards = [self._files[rank, stage].infos[name] for rank in range(self.tp)]
            if len(set(shards)) > 1:
                raise ConversionError(f"{self.directory}: shards of {name} differ in shape or dtype: {shards}")
            if split.dim is None:
                infos[name] = shards[0]
                continue
            shape = list(shards[0].shape)
            shape[split.dim] *= self.tp
            if split.pads:
                padded = split.padded(self.mapping.vocab_size, self.tp)
                if shape[0] != padded:
                    raise ConversionError(f"{self.directory}: {name} has {shape[0]} rows, {MANIFEST} says {padded}")
                shape[0] = self.mapping.vocab_size
            infos[name] = TensorInfo(dtype=shards[0].dtype, shape=tuple(shape))
        return infos
