"""Weight mappings: how HF tensors become Megatron tensors, and back. Pure functions of tensors, no process group.

    HF tensors <--Entry.to_full / from_full--> full Megatron tensor <--Split.shards / merge--> tp shards

A *full* tensor is the Megatron tensor as one tensor parallel rank would hold it (fused, group-major qkv; [gate; up]),
without vocabulary padding. A family's mapping is one list of entries; export is the inverse of import by construction.
Names of full tensors are global: ``language_model.decoder.layers.7`` is decoder layer 7 on whatever stage it lives.
"""

import collections.abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_vlm.errors import ConversionError

GROUPS = {"vision": "vision_model.", "connector": "connector.", "llm": "language_model."}
"""Parts of a model, which are frozen, given learning rates and quantised apart: group -> prefix of its global names."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def meta(self) -> Tensor:
        """A tensor of this shape and dtype without data: mappings applied to it tell shapes without reading."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def cast(self, dtype: torch.dtype | None) -> "TensorInfo":
        """The info after floating point tensors are cast to ``dtype`` (None: each keeps its own)."""
        return TensorInfo(dtype=dtype, shape=self.shape) if dtype and self.dtype.is_floating_point else self

    @staticmethod
    def of(tensor: Tensor) -> "TensorInfo":
        """The info of a tensor at hand."""
        return TensorInfo(dtype=tensor.dtype, shape=tuple(tensor.shape))


class TensorStore(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def infos(self) -> collections.abc.Mapping[str, TensorInfo]:
        """Name -> dtype and shape."""

    def read(self, name: str) -> Tensor:
        """Reads one tensor."""

    def close(self) -> None:
        """Closes the files."""


class DerivedTensors:
    """Tensors computed when they are read: renamed, extended or freshly drawn ones.

    Args:
        infos: name -> what ``read`` will return.
        readers: name -> function that computes it.
        sources: stores that the functions read, closed together with this one.
    """

    def __init__(
        self,
        infos: collections.abc.Mapping[str, TensorInfo],
        readers: collections.abc.Mapping[str, Callable[[], Tensor]],
        sources: Iterable[TensorStore] = (),
    ):
        self.infos = dict(infos)
        self._readers = dict(readers)
        self._sources = tuple(sources)

    def read(self, name: str) -> Tensor:
        """Computes one tensor."""
        return self._readers[name]()

    def close(self) -> None:
        """Closes the files."""
        for source in self._sources:
            source.close()


@dataclass(frozen=True, kw_only=True)
class HFModel:
    """An HF model of which tensors are read one at a time.

    Attributes:
        directory: its non-weight files.
        config: content of its config.json.
        tensors: under the names of its files.
    """

    directory: Path
    config: dict[str, Any]
    tensors: TensorStore


@dataclass(frozen=True, kw_only=True)
class Split:
    """How one full tensor lies over tensor parallel ranks.

    Attributes:
        dim: the dimension that is cut; None: every rank holds the whole tensor.
        stride: blocks along ``dim`` that are each cut on their own (2 for [gate; up]: a shard is [gate_r; up_r]).
        vocab_multiple: pad dim 0, rows of the vocabulary, with zero rows to a multiple of this times tp before cutting; 0: none.
        vocab_extra: zero rows that are added before that padding.
    """

    dim: int | None = None
    stride: int = 1
    vocab_multiple: int = 0
    vocab_extra: int = 0

    @property
    def pads(self) -> bool:
        """The rows are those of a vocabulary."""
        return self.vocab_multiple > 0

    def padded(self, size: int, tp: int) -> int:
        """Rows after padding a true size of ``size`` for ``tp`` ranks."""
        if not self.pads:
            return size
        unit = self.vocab_multiple * tp
        return -(-(size + self.vocab_extra) // unit) * unit

    def shard(self, full: Tensor, tp: int, rank: int) -> Tensor:
        """Cuts the shard of one rank out of a full tensor (a view where possible).

        Raises:
            ConversionError: the dimension does not divide.
        """
        pieces = self.pieces(full, tp, rank)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim or 0)

    def pieces(self, full: Tensor, tp: int, rank: int) -> list[Tensor]:
        """The shard of one rank as views of the full tensor, which lie end to end along the cut dimension."""
        if self.dim is None:
            return [full]
        size = self.padded(full.shape[0], tp) if self.pads else full.shape[self.dim]
        if size % (self.stride * tp):
            raise ConversionError(
                f"dimension {self.dim} of size {size} does not divide into {self.stride} x {tp} pieces"
            )
        if tp == 1 and size == full.shape[self.dim]:
            return [full]
        width = size // self.stride // tp
        starts = [block * (size // self.stride) + rank * width for block in range(self.stride)]
        pieces = [full.narrow(self.dim, start, width) for start in starts if start + width <= full.shape[self.dim]]
        if not pieces:  # the shard reaches into the padded rows
            real = full[starts[0] :]
            pieces = [real, full.new_zeros(width - real.shape[0], *full.shape[1:])]
        return pieces

    def shards(self, full: Tensor, tp: int) -> list[Tensor]:
        """Cuts a full tensor into ``tp`` shards (views where possible)."""
        return [self.shard(full, tp, rank) for rank in range(tp)]

    def merge(self, shards: Sequence[Tensor], true_size: int | None = None) -> Tensor:
        """Puts shards back into the full tensor; ``true_size`` rows of a padded vocabulary are kept.

        Raises:
            ConversionError: replicas differ.
        """
        if self.dim is None:
            for rank, shard in enumerate(shards[1:], 1):
                if not torch.equal(shard, shards[0]):
                    raise ConversionError(f"replicated tensor differs between tensor parallel ranks 0 and {rank}")
            return shards[0]
        if len(shards) == 1:
            full = shards[0]
        elif self.stride == 1:
            full = torch.cat(list(shards), self.dim)
        else:
            pieces = [shard.chunk(self.stride, self.dim) for shard in shards]
            full = torch.cat([piece[block] for block in range(self.stride) for piece in pieces], self.dim)
        if self.pads and true_size is not None:
            full = full[:true_size]
        return full


REPLICATED = Split()
COLUMN = Split(dim=0)
ROW = Split(dim=1)
GATED = Split(dim=0, stride=2)
VOCAB = Split(dim=0, vocab_multiple=1)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One full tensor and the HF tensors it is made of. Build with ``direct``, ``qkv``, ``concat`` or ``gated``."""

    name: str
    hf: tuple[str, ...]
    split: Split
    to_full: Callable[[Sequence[Tensor]], Tensor]
    from_full: Callable[[Tensor], list[Tensor]]
    end_to_end: bool = False
    """The HF tensors lie end to end in the full one: they can be streamed without building it."""

    @property
    def cut_by_rows(self) -> bool:
        """Each HF tensor is one block of the split, cut along its rows: shards are row ranges of the HF tensors."""
        return self.end_to_end and self.split.dim == 0 and self.split.stride == len(self.hf)


def direct(name: str, hf: str, split: Split = REPLICATED) -> Entry:
    """The same tensor under another name."""
    return Entry(
        name=name,
        hf=(hf,),
        split=split,
        to_full=lambda tensors: tensors[0],
        from_full=lambda full: [full],
        end_to_end=True,
    )


def qkv(name: str, hf: Sequence[str], *, num_heads: int, num_query_groups: int, split: Split = COLUMN) -> Entry:
    """Fuses q, k, v (weights [n * d, h] or biases [n * d]) group by group: [q_0 .. q_{g-1}, k, v] per query group.

    ``hf`` names three tensors, or one with the three end to end.

    Source of the order: megatron-core 0.16.1, transformer/attention.py, ``get_query_key_value_tensors``.
    """
    heads_per_group = num_heads // num_query_groups

    def to_full(tensors: Sequence[Tensor]) -> Tensor:
        if len(hf) == 1:
            dim = tensors[0].shape[0] // (num_heads + 2 * num_query_groups)
            tensors = tensors[0].split([num_heads * dim, num_query_groups * dim, num_query_groups * dim])
        groups = [t.reshape(num_query_groups, -1, *t.shape[1:]) for t in tensors]
        return torch.cat(groups, 1).reshape(-1, *tensors[0].shape[1:])

    def from_full(full: Tensor) -> list[Tensor]:
        groups = full.reshape(num_query_groups, -1, *full.shape[1:])
        dim = groups.shape[1] // (heads_per_group + 2)
        parts = groups.split([heads_per_group * dim, dim, dim], 1)
        tensors = [part.reshape(-1, *full.shape[1:]) for part in parts]
        return tensors if len(hf) == 3 else [torch.cat(tensors)]

    return Entry(name=name, hf=tuple(hf), split=split, to_full=to_full, from_full=from_full)


def gated(name: str, hf: Sequence[str], split: Split = GATED) -> Entry:
    """[gate; up] of a gated MLP."""
    return Entry(
        name=name,
        hf=tuple(hf),
        split=split,
        to_full=lambda tensors: torch.cat(list(tensors)),
        from_full=lambda full: list(full.chunk(len(hf))),
        end_to_end=True,
    )


@dataclass(frozen=True, kw_only=True)
class Mapping:
    """A family's whole weight map for one model config.

    Attributes:
        entries: every full tensor, in the order files are written.
        ignored: HF names that may be present and are not used (buffers), by exact name.
        hf_tied: HF names that repeat another tensor of the model (a tied head): name -> the name it repeats.
            Read from a source only to check that they are equal; written on export only if the source had them.
        hf_aliases: ``rename(hf name found in a file) -> hf name of the entries`` for other spellings on disk.
        module_name: ``rename(hf name of an entry, or of its module) -> name in memory`` of the class that loads the files:
            transformers' where it has one, else the original's. Adapters name modules so.
        vocab_size: true rows of the tensors whose split pads the vocabulary.
    """

    entries: tuple[Entry, ...]
    vocab_size: int
    ignored: frozenset[str] = frozenset()
    hf_tied: dict[str, str] = field(default_factory=dict)
    hf_aliases: Callable[[str], str] = str
    module_name: Callable[[str], str] = str

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for entry in self.entries:
            for name in (f"mg:{entry.name}", *(f"hf:{name}" for name in entry.hf)):
                if name in seen:
                    raise ConversionError(f"mapping names {name[3:]} twice")
                seen.add(name)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def padded(self, multiple: int, extra: int = 0) -> "Mapping":
        """The same map, the vocabulary of its shards padded: see ``Split``. A family's own map pads to a multiple of tp alone."""
        entries = (
            replace(entry, split=replace(entry.split, vocab_multiple=multiple, vocab_extra=extra))
            if entry.split.pads
            else entry
            for entry in self.entries
        )
        return replace(self, entries=tuple(entries))

    def whole(self, *groups: str) -> "Mapping":
        """The same map, some parts of the model whole on every tensor parallel rank."""
        entries = (replace(e, split=REPLICATED) if group_of(e.name) in groups else e for e in self.entries)
        return replace(self, entries=tuple(entries))

    def by_name(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.entries}

    def hf_names(self) -> set[str]:
        return {name for entry in self.entries for name in entry.hf}


@dataclass(frozen=True)
class Prefixes:
    """How names begin in memory of the class that loads a model's files, and how in the files.

    Args:
        pairs: (in memory, in files); the longest that fits a name holds, of equally long ones the first.
    """

    pairs: tuple[tuple[str, str], ...]

    def file_name(self, name: str) -> str:
        """The name of a tensor in files, given that or the one in memory."""
        memory, disk = max((p for p in self.pairs if name.startswith(p[0])), key=lambda p: len(p[0]), default=("", ""))
        return disk + name.removeprefix(memory)

    def module_name(self, name: str) -> str:
        """The inverse, for a tensor or its module."""
        memory, disk = max((p for p in self.pairs if name.startswith(p[1])), key=lambda p: len(p[1]), default=("", ""))
        return memory + name.removeprefix(disk)


def group_of(name: str) -> str:
    """Part of the model that a global name lies in."""
    for group, prefix in GROUPS.items():
        if name.startswith(prefix):
            return group
    raise ValueError(f"parameter {name!r} belongs to no group")
