"""Hugging Face directories: weights read lazily, tensor by tensor, and written as sharded safetensors with an index.

directory or hub id --resolve_directory--> directory --HFTensors--> names, shapes, read(name)
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Self

import torch
from torch import Tensor

from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.files import read_json, sync_path, write_json
from megatron_vlm.weights.mapping import TensorInfo
from megatron_vlm.weights.model_folder import WEIGHT_PATTERNS
from megatron_vlm.weights.remote import fetch, is_url
from megatron_vlm.weights.safetensors_io import SafetensorsFile, SafetensorsWriter, aligned_order
from megatron_vlm.weights.torch_files import TorchFile

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
BIN_NAME, BIN_INDEX_NAME = "pytorch_model.bin", "pytorch_model.bin.index.json"
_NEVER_FETCHED = [p for p in WEIGHT_PATTERNS if "safetensors" not in p] + ["original/*", "onnx/*", "flax/*"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_directory(path_or_id: str | os.PathLike) -> Path:
    """Returns the directory itself, or the local copy of a hub id (``org/name``) or a URL (remote.py), fetched where need be.

    huggingface_hub's own variables apply: HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN.

    Raises:
        ConversionError: neither a directory nor a model that the hub or its cache has.
        CheckpointError: nothing whole is at the URL.
    """
    text = str(path_or_id)
    if is_url(text):
        return fetch(text)
    path = Path(path_or_id)
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(text):
        what = "is a file" if path.exists() else "does not exist"
        raise ConversionError(f"{path} {what}: give a model directory, or a hub id such as HuggingFaceM4/idefics2-8b")
    from huggingface_hub import constants, snapshot_download

    try:
        snapshot = Path(snapshot_download(text, ignore_patterns=_NEVER_FETCHED))
        if (snapshot / CONFIG_NAME).exists() and not any(snapshot.glob("*.safetensors*")):
            snapshot = Path(snapshot_download(text, allow_patterns=["pytorch_model*.bin", BIN_INDEX_NAME]))
        return snapshot
    except (
        OSError,
        ValueError,
    ) as error:  # its own errors (no connection, no such model, offline mode, bad id) are these
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        offline = ", and HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        raise ConversionError(
            f"{text!r} is neither a directory here nor a model that could be fetched from the hub or found in "
            f"its cache {constants.HF_HUB_CACHE}{offline} ({reason})"
        ) from error


class HFTensors:
    """The tensors of an HF directory: ``model.safetensors``, or the shards of its index; else ``pytorch_model.bin`` likewise.

    Files stay open until ``close``.

    Attributes:
        infos: name -> TensorInfo of every tensor, as named in the files.

    Raises:
        ConversionError: no weights, a shard absent or damaged, or index and shards disagree.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        self._files: dict[str, SafetensorsFile | TorchFile] = {}
        self._file_of: dict[str, str] = {}
        self._indices: list[str] = []
        try:
            for index, whole in ((INDEX_NAME, WEIGHTS_NAME), (BIN_INDEX_NAME, BIN_NAME)):
                if (self.directory / index).exists():
                    self._open_index(self.directory / index)
                    break
                if (self.directory / whole).exists() or (self.directory / whole).is_symlink():
                    self._open(whole)
                    break
            else:
                raise ConversionError(self._explain_absence())
        except BaseException:
            self.close()
            raise
        self.infos = {name: self._files[file].infos[name] for name, file in self._file_of.items()}

    def read(self, name: str) -> Tensor:
        """Reads one tensor into fresh memory."""
        return self._files[self._file_of[name]].read(name)

    def file_names(self) -> list[str]:
        """Names of the files that were opened, the index included."""
        return [*self._indices, *self._files]

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()

    def _open(self, name: str) -> None:
        reader = TorchFile if name.endswith(".bin") else SafetensorsFile
        file = self._files[name] = reader(self.directory / name)
        for tensor in file.infos:
            if tensor in self._file_of:
                raise ConversionError(f"{tensor} is both in {self._file_of[tensor]} and {name} of {self.directory}")
            self._file_of[tensor] = name

    def _open_index(self, index: Path) -> None:
        self._indices.append(index.name)
        weight_map = read_json(index, ConversionError).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConversionError(f"{index} has no weight_map")
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not shard or PurePosixPath(shard).name != shard or "\0" in shard:
                raise ConversionError(f"{index} names {shard!r} as the file of {name}: it must be a file beside it")
        for shard in sorted(set(weight_map.values())):
            if not (self.directory / shard).exists():
                raise ConversionError(f"{index} names shard {shard}, which is not in {self.directory}")
            self._open(shard)
        absent = sorted(name for name, shard in weight_map.items() if self._file_of.get(name) != shard)
        if absent:
            raise ConversionError(
                f"{len(absent)} tensors are not in the file that {index} names for them: "
                + list_names(f"{name} ({weight_map[name]})" for name in absent)
            )
        extra = sorted(set(self._file_of) - set(weight_map))
        if extra:
            raise ConversionError(f"{len(extra)} tensors in the shards are not in {index}: {list_names(extra)}")

    def _explain_absence(self) -> str:
        others = sorted({p.name for pattern in WEIGHT_PATTERNS for p in self.directory.glob(pattern)})
        advice = "no weights of other names or formats are read: take the model in safetensors, or save it so with transformers"
        found = f"; it has {list_names(others)}: {advice}" if others else ""
        return f"{self.directory} has none of {WEIGHTS_NAME}, {INDEX_NAME}, {BIN_NAME} and {BIN_INDEX_NAME}{found}"


def list_names(names: Iterable[str], limit: int = 20) -> str:
    """``a, b, c`` with the count of those left out beyond ``limit``."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def parse_size(text: str | int) -> int:
    """Bytes of ``"5GB"``, ``"500MB"``, ``"2GiB"`` or a plain number, as transformers reads ``max_shard_size``.

    Raises:
        ConfigError: not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?", str(text).strip(), re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise ConfigError(f"max_shard_size {text!r} is not a size: write for example 5GB, 500MB or 2GiB")
    unit = (match[2] or "B").upper()
    base = 1024 if "I" in unit else 1000
    return int(float(match[1]) * base ** "BKMGT".index(unit[0]))


def plan_shards(infos: Mapping[str, TensorInfo], max_shard_size: str | int) -> dict[str, dict[str, TensorInfo]]:
    """Deals tensors, in order, to files of at most ``max_shard_size`` under HF's names (a larger one gets its own)."""
    limit = parse_size(max_shard_size)
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + info.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.nbytes
    if len(shards) == 1:
        return {WEIGHTS_NAME: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


class HFWriter:
    """Writes the weights of an HF directory in streaming order: one shard file open at a time.

    Args:
        directory: exists.
        infos: every tensor, in the order in which it will be written; widest dtypes first (``aligned_order``).
        max_shard_size: as of ``save_pretrained``.
    """

    def __init__(self, directory: Path, infos: Mapping[str, TensorInfo], max_shard_size: str | int = "5GB"):
        self.directory = directory
        self._plan = plan_shards(aligned_order(infos), max_shard_size)
        self._shard_of = {name: shard for shard, names in self._plan.items() for name in names}
        self._current = ""
        self._writer: SafetensorsWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer:
            self._writer.abort()

    def write(self, name: str, *pieces: Tensor) -> None:
        """Writes the next tensor, given whole or as pieces along its first dimension."""
        shard = self._shard_of[name]
        if shard != self._current:
            if self._writer:
                self._writer.close()
            self._current = shard
            self._writer = SafetensorsWriter(self.directory / shard, self._plan[shard], {"format": "pt"})
        assert self._writer is not None
        self._writer.write(name, *pieces)

    def close(self) -> None:
        """Finishes the last shard and writes the index where there is more than one."""
        if self._writer:
            self._writer.close()
        if len(self._plan) > 1:
            infos = [info for shard in self._plan.values() for info in shard.values()]
            metadata = {
                "total_parameters": sum(info.meta().numel() for info in infos),
                "total_size": sum(info.nbytes for info in infos),
            }
            write_json(
                self.directory / INDEX_NAME, {"metadata": metadata, "weight_map": dict(sorted(self._shard_of.items()))}
            )
        sync_path(self.directory)


def write_config(hf_dir: Path, hf_config: dict[str, Any], dtype: torch.dtype | None) -> None:
    """Rewrites the copied config.json where ``hf_config`` differs from it, or where ``dtype`` changes what it says."""
    config = dict(hf_config)
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(dtype).removeprefix("torch.")
    path = hf_dir / CONFIG_NAME
    if not path.exists() or read_json(path, ConversionError) != config:
        hf_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, config)
