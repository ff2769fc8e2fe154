"""An adapter in memory: pairs A, B and tensors trained in full, under the HF names of one weight map.

    y = x (W + scaling B A)^T          A [r, inputs], B [outputs, r]; of a fused linear one pair, as PEFT has it

``renamed`` takes an adapter from one HF naming of a family to another, exactly: both hold the rows of the same full
tensors, so that rows of B move as rows of W do. A linear that falls into parts gives each its A; parts that become one linear
stack their ranks, each with its own rows of B.
"""

import math
from collections.abc import Callable
from collections.abc import Mapping as Dict
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_vlm.weights.mapping import Entry, Mapping, TensorInfo

WEIGHT = ".weight"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What LoRA adds to one linear.

    Attributes:
        a: [r, inputs].
        b: [outputs, r].
        alpha: see ``scaling``.
        rslora: scale by alpha / sqrt(r), not alpha / r.
    """

    a: Tensor
    b: Tensor
    alpha: float
    rslora: bool = False

    @property
    def r(self) -> int:
        return self.a.shape[0]

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def merged(self, weight: Tensor) -> Tensor:
        """``weight`` + scaling B A, computed in fp32 and cast once, to the dtype of ``weight``."""
        delta = (self.b.float() @ self.a.float()) * self.scaling
        return (weight.float() + delta).to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Everything that was trained, over a base that was not.

    Attributes:
        pairs: linear (HF name without ``.weight``) -> its pair.
        full: HF name -> tensor that takes the place of the base's (PEFT's ``modules_to_save``, and biases).
        copies: HF name -> weight of the base that is kept beside: embedding and head, where they are adapted or were extended.
        bias: which biases are among ``full``, in PEFT's words.
        dropout: before A, in training.
        base: PEFT's ``base_model_name_or_path``; None: unknown.
        mark: values of the base's weights, to know it by (see merge.py); None: unknown.
    """

    pairs: dict[str, Pair]
    full: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    bias: Literal["none", "all", "lora_only"] = "none"
    dropout: float = 0.0
    base: str | None = None
    mark: tuple[float, ...] | None = None

    def touches(self, entry: Entry) -> bool:
        """Something of the entry is adapted or trained in full."""
        return any(name in self.full or name.removesuffix(WEIGHT) in self.pairs for name in entry.hf)

    def applied(self, name: str, weight: Tensor) -> Tensor:
        """The merged tensor of HF name ``name``."""
        if name in self.full:
            weight = self.full[name].to(weight.dtype)
        pair = self.pairs.get(name.removesuffix(WEIGHT)) if name.endswith(WEIGHT) else None
        return pair.merged(weight) if pair else weight


def hf_infos(mapping: Mapping, infos: Dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Shapes of the HF tensors of a map, given those of the full tensors."""
    return {
        name: TensorInfo.of(part)
        for entry in mapping
        for name, part in zip(entry.hf, entry.from_full(infos[entry.name].meta()), strict=True)
    }


def renamed(
    adapter: Adapter, old: Mapping, new: Mapping, infos: Dict[str, TensorInfo], read: Callable[[str], Tensor]
) -> Adapter:
    """The same adapter under the names of another naming of the model.

    Args:
        adapter: under the names of ``old``.
        old, new: maps of the same full tensors.
        infos: of the base's full tensors, by their own names.
        read: reads one of them; called for those with parts that were trained in full.
    """
    pairs: dict[str, Pair] = {}
    full: dict[str, Tensor] = {}
    olds = old.by_name()
    for entry in new:
        before = olds[entry.name]
        if before.hf == entry.hf and len(entry.hf) == 1:
            (name,) = entry.hf
            pairs |= {n: adapter.pairs[n] for n in [name.removesuffix(WEIGHT)] if n in adapter.pairs}
            full |= {n: adapter.full[n] for n in [name] if n in adapter.full}
        elif adapter.touches(before):
            if any(name in adapter.full for name in before.hf):
                parts = zip(before.hf, before.from_full(read(entry.name)), strict=True)
                whole = before.to_full([adapter.full.get(name, part) for name, part in parts])
                full |= dict(zip(entry.hf, entry.from_full(whole), strict=True))
            pairs |= _moved(adapter.pairs, before, entry, infos[entry.name].shape[0])
    return replace(adapter, pairs=pairs, full=full)


def _moved(pairs: dict[str, Pair], old: Entry, new: Entry, rows: int) -> dict[str, Pair]:
    """The pairs of one full tensor's linears, from one set of names to the other."""
    numbers = torch.arange(rows)
    sources: list[tuple[Pair, Tensor]] = []  # a pair, and of each full row its row of B (-1: none)
    for name, part in zip(old.hf, old.from_full(numbers), strict=True):
        if pair := pairs.get(name.removesuffix(WEIGHT)):
            place = torch.full((rows,), -1)
            place[part] = torch.arange(len(part))
            sources.append((pair, place))
    moved = {}
    for name, part in zip(new.hf, new.from_full(numbers), strict=True):
        found = [(pair, place[part]) for pair, place in sources if bool((place[part] >= 0).any())]
        if found:
            moved[name.removesuffix(WEIGHT)] = _stacked(found)
    return moved


def _stacked(parts: list[tuple[Pair, Tensor]]) -> Pair:
    """One pair out of several with their rows of the result (-1: not theirs)."""
    first = parts[0][0]
    columns = []
    for pair, place in parts:
        b = pair.b[place.clamp_min(0)]
        b[place < 0] = 0
        columns.append(b if pair.scaling == first.scaling else b * (pair.scaling / first.scaling))
    if len(parts) == 1:
        return replace(first, b=columns[0])
    a = torch.cat([pair.a for pair, _ in parts])
    r = a.shape[0]
    alpha = first.scaling * (math.sqrt(r) if first.rslora else r)
    return Pair(a=a, b=torch.cat(columns, 1), alpha=alpha, rslora=first.rslora)
