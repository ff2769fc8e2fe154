"""What trains, and the pairs A, B as entries of the weight map. Pure functions, no process group.

    Mapping of a naming + PeftPlan --adapter_mapping--> Mapping with two more entries per target

A pair belongs to one HF linear, so a fused linear of ours has several: ``linear_qkv.lora.q_proj.{a,b}`` and so on. How A and B
lie over tensor parallel ranks follows from the split of the linear's weight [out, in]:

    cut along out (column parallel)   A whole, B cut like the rows of its HF tensor
    cut along in (row parallel)       A cut along in, B whole
    whole                             both whole

B keeps its rows in the order in which the weight's rows lie in our fused tensor, so that a rank's rows are one piece. Where they
are not (fewer kv heads than ranks), B is whole on every rank.
"""

import dataclasses
from collections.abc import Mapping as Dict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_vlm.weights.mapping import COLUMN, REPLICATED, ROW, Entry, Mapping, Split, direct, group_of


@dataclass(frozen=True, kw_only=True)
class Target:
    """One linear of the HF model that gets a pair.

    Attributes:
        entry: of the weight [out, in] that holds it, in the naming that the plan was made for.
        index: its place in ``entry.hf``.
        hf_module: its name as PEFT sees it.
        part_rows: rows of each of ``entry.hf``.
        full_rows: rows of the full tensor, which the head of another naming may have fewer of.
        inputs: in.
        r, alpha, dropout: of the pair.
        scaling: what B A x is multiplied by.
    """

    entry: Entry
    index: int
    hf_module: str
    part_rows: tuple[int, ...]
    full_rows: int
    inputs: int
    r: int
    alpha: float
    dropout: float
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the HF weight."""
        return self.part_rows[self.index], self.inputs

    @property
    def linear(self) -> str:
        """Global name of the module that holds the weight."""
        return self.entry.name.removesuffix(".weight")

    @property
    def key(self) -> str:
        """What tells the pair from others of the same linear."""
        return self.hf_module.rpartition(".")[2]

    @property
    def name(self) -> str:
        """Global name of the pair: ``.a`` and ``.b`` behind it are those of its parameters."""
        return f"{self.linear}.lora.{self.key}"


@dataclass(frozen=True, kw_only=True)
class PeftPlan:
    """What trains.

    Attributes:
        targets: the pairs, in the order of the weight map.
        saved: entries of base weights that are trained in full (``modules_to_save``).
        biases: entry of a bias that trains -> HF names of its parts that do.
        bias_entries: these entries, in the naming that the plan was made for.
        init: how A starts.
    """

    targets: tuple[Target, ...]
    saved: tuple[str, ...] = ()
    biases: Dict[str, tuple[str, ...]] = field(default_factory=dict)
    bias_entries: Dict[str, Entry] = field(default_factory=dict)
    init: str = "kaiming"

    @property
    def names(self) -> set[str]:
        """Global names of all parameters that the plan adds or trains."""
        pairs = {f"{target.name}.{part}" for target in self.targets for part in "ab"}
        return pairs | set(self.saved) | set(self.biases)

    @property
    def groups(self) -> frozenset[str]:
        """Parts of the model (llm, vision, connector) in which something trains."""
        return frozenset(map(group_of, self.names))


def adapter_mapping(base: Mapping, plan: PeftPlan, tp: int = 1) -> Mapping:
    """Returns ``base`` (the family's map for ``tp`` ranks) with two entries per target behind its own."""
    entries = base.by_name()
    pairs = [pair for target in plan.targets for pair in _pair(target, entries[target.entry.name].split, tp)]
    return dataclasses.replace(base, entries=(*base.entries, *pairs))


def trained_mapping(base: Mapping, plan: PeftPlan, tp: int = 1) -> Mapping:
    """The part of ``adapter_mapping`` that a checkpoint of such a run holds: pairs, saved weights and trained biases."""
    whole, names = adapter_mapping(base, plan, tp), plan.names
    return dataclasses.replace(whole, entries=tuple(entry for entry in whole if entry.name in names))


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one HF tensor within what a rank holds of the fused one.

    Attributes:
        source: int64, which rows of B they are.
        place: int64, where they lie in the rank's output.
    """

    source: Tensor
    place: Tensor


def local_rows(target: Target, split: Split, tp: int, rank: int) -> Rows:
    """Which outputs of a rank belong to a target; ``split`` is that of the linear's weight for ``tp`` ranks."""
    if split.pads:  # one HF tensor, padded at its end
        width = split.padded(target.full_rows, tp) // tp
        return Rows(source=torch.arange(rank * width, (rank + 1) * width), place=torch.arange(width))
    fused = _fused(target)
    local = split.shard(fused, tp, rank) if split.dim == 0 else fused
    place = (local >= 0).nonzero()[:, 0]
    row_of = _order(fused).argsort()
    return Rows(source=row_of[local[place]], place=place)


def shared_evenly(target: Target, split: Split, tp: int) -> bool:
    """Whether each rank's rows of a target are one of ``tp`` equal pieces. Not so with fewer kv heads than ranks."""
    if split.dim != 0 or split.pads or tp == 1:
        return True
    rows = torch.arange(target.shape[0])
    return len(rows) % tp == 0 and all(
        torch.equal(local_rows(target, split, tp, rank).source, piece) for rank, piece in enumerate(rows.chunk(tp))
    )


def _pair(target: Target, split: Split, tp: int) -> list[Entry]:
    hf = f"base_model.model.{target.hf_module}.lora_"
    a = direct(f"{target.name}.a", f"{hf}A.weight", ROW if split.dim == 1 else REPLICATED)
    if split.pads:
        b, added = direct(f"{target.name}.b", f"{hf}B.weight", split), target.full_rows - target.shape[0]
        if not added:
            return [a, b]
        # This naming's HF head lacks the rows that our vocabulary has more (the image token's).
        return [
            a,
            dataclasses.replace(
                b,
                to_full=lambda tensors: torch.cat([tensors[0], tensors[0].new_zeros(added, tensors[0].shape[1])]),
                from_full=lambda full: [full[:-added]],
                end_to_end=False,
            ),
        ]
    cut = split.dim == 0 and shared_evenly(target, split, tp)
    b = direct(f"{target.name}.b", f"{hf}B.weight", COLUMN if cut else REPLICATED)
    order = _order(_fused(target))
    if not torch.equal(order, torch.arange(len(order))):
        back = order.argsort()
        b = dataclasses.replace(
            b,
            to_full=lambda tensors: tensors[0][order.to(tensors[0].device)],
            from_full=lambda full: [full[back.to(full.device)]],
            end_to_end=False,
        )
    return [a, b]


def _fused(target: Target) -> Tensor:
    """int64 [rows of the fused tensor]: the target's HF row that lies there, or -1."""
    parts = [torch.full((rows,), -1) for rows in target.part_rows]
    parts[target.index] = torch.arange(target.shape[0])
    return target.entry.to_full(parts)


def _order(fused: Tensor) -> Tensor:
    """HF rows in the order in which they lie in the fused tensor: the order of B's rows."""
    return fused[fused >= 0]
