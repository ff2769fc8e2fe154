"""The tensors of a training checkpoint: one safetensors file per rank, each element in exactly one of them.

    rank 0..N-1: [Piece + tensor] --RankFile.write--> rankR.safetensors --RankFiles--> full tensor | tp shard

Every kind of state is a fragment of a full tensor, told by one ``Piece``:

    full tensor --Split--> tp shard --flat, [start : start + its length]--> fragment

A file holds ``model/NAME`` (a weight, or a pair of adapters) and ``param/NAME``, ``exp_avg/NAME`` and ``exp_avg_sq/NAME`` (the
optimizer's state of it). A tensor in the shape of the shard is all of it, a flat one the fragment from the piece's ``start``
on: today weights are written whole by one of their copies and a distributed optimizer writes fragments. Fully sharded
parameters need nothing more: each rank writes its fragment of the weight too, from the same ``start`` as its state.

The header says where each piece belongs, so reading needs neither a process group nor the layout of the run that wrote it. A
tensor is rebuilt by laying fragments end to end into tp shards, and these into the full tensor; padded vocabulary rows are
dropped on the way.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from megatron_vlm.errors import CheckpointError, ConversionError
from megatron_vlm.weights.hashed_file import HashedFile
from megatron_vlm.weights.mapping import Split
from megatron_vlm.weights.safetensors_io import SafetensorsFile, TensorInfo, aligned_order, header_of
from megatron_vlm.weights.save_process import HostImage

Kind = Literal["model", "param", "exp_avg", "exp_avg_sq"]
"""Weights; fp32 main parameters (only where the weights are not fp32); AdamW's first and second moments."""

FORMAT = "megatron_vlm.rank_file.1"
_MAX_LISTED = 10


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A parameter as one rank holds it.

    Attributes:
        name: global name.
        shape: of the full tensor, without vocabulary padding.
        local_shape: of the tensor parallel shard.
        split: how shards make up the full tensor.
        start: place of the rank's fragments in the flat shard (0 where it holds all of it).
        step: updates that AdamW has made to the parameter; None where the rank has no state of it.
    """

    name: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    split: Split
    start: int = 0
    step: float | None = None

    @property
    def numel(self) -> int:
        """Elements of the shard."""
        return torch.Size(self.local_shape).numel()

    def same_place(self, other: "Piece") -> bool:
        return (self.shape, self.local_shape, self.split) == (other.shape, other.local_shape, other.split)


def rank_file_name(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank{rank}.safetensors"


@dataclass(frozen=True, kw_only=True)
class RankFile:
    """What one rank owns, as the file that it becomes.

    Attributes:
        place: ``rank``, ``world_size``, ``tp`` and ``tp_rank`` of the writing rank.
        pieces: one per name in ``tensors``.
        tensors: (kind, name) -> tensor on any device, in the shard's shape or a flat fragment of it.
    """

    place: Mapping[str, int]
    pieces: Iterable[Piece]
    tensors: Mapping[tuple[Kind, str], Tensor]

    @property
    def name(self) -> str:
        return rank_file_name(self.place["rank"])

    @property
    def num_bytes(self) -> int:
        """Of the tensors; the header adds little."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def parts(self) -> tuple[bytes, list[Tensor]]:
        """The header, and the tensors that follow it end to end."""
        metadata = {
            "format": FORMAT,
            "place": json.dumps(dict(self.place)),
            "pieces": json.dumps({piece.name: _fields(piece) for piece in self.pieces}, separators=(",", ":")),
        }
        named = {f"{kind}/{name}": tensor for (kind, name), tensor in self.tensors.items()}
        infos = aligned_order({key: TensorInfo.of(tensor) for key, tensor in named.items()})
        return header_of(Path(self.name), infos, metadata), [named[key].detach() for key in infos]

    def write(self, directory: Path) -> dict[str, Any]:
        """Writes the file and flushes it to disk; returns its ``{"size", "sha256"}``.

        Raises:
            ConversionError, OSError: the disk refuses.
        """
        header, tensors = self.parts()
        file = HashedFile(directory / self.name)
        try:
            file.put(memoryview(header))
            for tensor in tensors:
                file.put(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            return file.close()
        except BaseException:
            file.abort()
            raise

    def copy_to(self, image: HostImage) -> None:
        """Fills ``image`` with the bytes that ``write`` would write.

        Raises:
            OSError: there is not so much memory.
        """
        header, tensors = self.parts()
        at = len(header)
        with image.resized(at + sum(tensor.nbytes for tensor in tensors)) as memory:
            memory[:at] = header
            for tensor in tensors:
                if tensor.numel():
                    target = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=at)
                    target.view(tensor.shape).copy_(tensor)
                    del target  # it holds the mapping
                at += tensor.nbytes


@dataclass(frozen=True)
class _Part:
    """One stored tensor and its place in the flat tp shard."""

    file: SafetensorsFile
    key: str
    start: int
    end: int


class RankFiles:
    """All rank files of one checkpoint directory, opened for reading.

    Attributes:
        tp: tensor parallel size of the run that wrote them.
        steps: name -> AdamW's number of updates, of parameters with optimizer state.

    Raises:
        CheckpointError: a file is absent or damaged, or an element is stored twice or not at all; the message names it.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.tp = 0
        self.steps: dict[str, float] = {}
        self._pieces: dict[str, Piece] = {}
        self._parts: dict[tuple[str, Kind], dict[int, list[_Part]]] = defaultdict(lambda: defaultdict(list))
        self._files: list[SafetensorsFile] = []
        try:
            world = self._open(0)
            for rank in range(1, world):
                if self._open(rank) != world:
                    raise CheckpointError(f"{self.directory} mixes files of runs of different sizes")
            self._check_cover()
        except BaseException as error:
            self.close()
            if isinstance(error, ConversionError | KeyError | TypeError | ValueError):
                raise CheckpointError(f"{self.directory} is damaged: {error}") from error
            raise

    def names(self, kind: Kind = "model") -> list[str]:
        """Global names of the stored tensors of a kind."""
        return [name for name, stored in self._parts if stored == kind]

    def has(self, name: str, kind: Kind = "model") -> bool:
        return (name, kind) in self._parts

    def info(self, name: str, kind: Kind = "model") -> TensorInfo:
        """Dtype and shape of the full tensor, without vocabulary padding."""
        part = next(iter(self._parts[name, kind].values()))[0]
        return TensorInfo(dtype=part.file.infos[part.key].dtype, shape=self._pieces[name].shape)

    def read(self, name: str, kind: Kind = "model") -> Tensor:
        """Reads one full tensor, without vocabulary padding.

        Raises:
            CheckpointError: nothing of that name and kind is stored, or a file cannot be read.
        """
        self._need(name, kind)
        piece = self._pieces[name]
        shards = [self._shard(name, kind, tp_rank) for tp_rank in self._tp_ranks(piece)]
        return piece.split.merge(shards, piece.shape[0] if piece.split.pads else None)

    def read_shard(self, name: str, split: Split, tp: int, tp_rank: int, kind: Kind = "model") -> Tensor:
        """Reads what one tensor parallel rank of any run holds; touches only its own bytes where the splits agree.

        Raises:
            CheckpointError: as ``read``.
        """
        self._need(name, kind)
        if tp == self.tp and split == self._pieces[name].split:
            return self._shard(name, kind, tp_rank if split.dim is not None else 0)
        return split.shard(self.read(name, kind), tp, tp_rank)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, rank: int) -> int:
        """Indexes one file; returns the number of files that there must be."""
        file = SafetensorsFile(self.directory / rank_file_name(rank))
        self._files.append(file)
        if file.metadata.get("format") != FORMAT:
            raise CheckpointError(
                f"{file.path} has format {file.metadata.get('format')!r}, this version reads {FORMAT!r}"
            )
        place = json.loads(file.metadata["place"])
        if place["rank"] != rank:
            raise CheckpointError(f"{file.path} was written by rank {place['rank']}: files were renamed or mixed up")
        if self.tp not in (0, place["tp"]):
            raise CheckpointError(f"{self.directory} mixes files of tensor parallel sizes {self.tp} and {place['tp']}")
        self.tp = place["tp"]
        pieces = {name: _piece(fields) for name, fields in json.loads(file.metadata["pieces"]).items()}
        for name, piece in pieces.items():
            if not self._pieces.setdefault(name, piece).same_place(piece):
                raise CheckpointError(f"{file.path} and another rank's file disagree on the shape of {name}")
            if piece.step is not None:
                self.steps[name] = piece.step
        for key, info in file.infos.items():
            kind, _, name = key.partition("/")
            start = 0 if info.shape == pieces[name].local_shape else pieces[name].start
            part = _Part(file, key, start, start + torch.Size(info.shape).numel())
            self._parts[name, kind][place["tp_rank"]].append(part)  # type: ignore[index]
        return place["world_size"]

    def _check_cover(self) -> None:
        problems = []
        for (name, kind), by_rank in self._parts.items():
            piece = self._pieces[name]
            for tp_rank in sorted({*self._tp_ranks(piece), *by_rank}):
                parts = by_rank.get(tp_rank, [])
                parts.sort(key=lambda part: part.start)
                ends = [0, *(part.end for part in parts)]
                starts = [*(part.start for part in parts), piece.numel]
                for end, start in zip(ends, starts):
                    if start != end:
                        what = "stored twice" if start < end else "missing"
                        span = f"[{min(start, end)}, {max(start, end)})"
                        problems.append(f"{kind} of {name}, tp rank {tp_rank}: elements {span} of {piece.numel} {what}")
        if problems:
            more = f"\n  and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
            listed = "\n  ".join(problems[:_MAX_LISTED])
            raise CheckpointError(f"{self.directory} does not hold every element once:\n  {listed}{more}")

    def _tp_ranks(self, piece: Piece) -> range:
        return range(1 if piece.split.dim is None else self.tp)

    def _need(self, name: str, kind: Kind) -> None:
        if not self.has(name, kind):
            raise CheckpointError(f"{self.directory} holds no {kind} of {name}")

    def _shard(self, name: str, kind: Kind, tp_rank: int) -> Tensor:
        parts = self._parts[name, kind][tp_rank]
        shape = self._pieces[name].local_shape
        try:
            if len(parts) == 1:
                return parts[0].file.read(parts[0].key).view(shape)
            return torch.cat([part.file.read(part.key).view(-1) for part in parts]).view(shape)
        except ConversionError as error:
            raise CheckpointError(str(error)) from error


def _fields(piece: Piece) -> dict[str, Any]:
    """What the header says of a piece; in the file, its split has the name that it had when the format began."""
    return {"layout" if key == "split" else key: value for key, value in dataclasses.asdict(piece).items()}


def _piece(fields: dict[str, Any]) -> Piece:
    shape, local_shape, split = tuple(fields["shape"]), tuple(fields["local_shape"]), Split(**fields["layout"])
    others = {key: value for key, value in fields.items() if key != "layout"}
    return Piece(**{**others, "shape": shape, "local_shape": local_shape, "split": split})
