"""LoRA in a model's stages: a pair A, B beside each adapted linear, everything else frozen.

    y = base(x) + scaling * B A dropout(x)          in the adapter's dtype (fp32), cast once to that of base(x)

    column parallel     a = A x of what this rank has of x; gathered under sequence parallelism, else the same on every rank
                        y_rank += B_rank a
    row parallel        a = sum over ranks of A_rank x_rank (scattered over tokens under sequence parallelism); y += B a

So what is exchanged is as wide as the rank, once. Gradients of A (column) and B (row) are sums over tokens, of which a rank sees
its own under sequence parallelism: marked like norms, megatron-core's finalize_model_grads sums them. Several pairs of a fused
linear (q, k, v; gate, up) go through together, each with its own dropout, and their outputs are laid out like the linear's.

The pairs hang in the linear as its branch ``lora`` (layers/linear.py). The head is never called as a module (models/language.py
takes its factors).
Sources: LoRA (arXiv 2106.09685); peft 0.21.2, tuners/lora/layer.py.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from megatron_vlm.errors import ConfigError
from megatron_vlm.layers.linear import Place
from megatron_vlm.models.built import Model, global_named_modules, global_named_parameters, mark_sharding
from megatron_vlm.parallel.rng import derive_seed
from megatron_vlm.parallel.shards import put
from megatron_vlm.parallel.topology import Topology
from megatron_vlm.peft.adapter_map import PeftPlan, Target, adapter_mapping, local_rows, shared_evenly, trained_mapping
from megatron_vlm.weights.mapping import Entry, Split

NEVER_RUN = "vision_model.unused_"
"""Layers of a tower behind the one whose output is read: their pairs are kept as they start, as PEFT keeps them."""


class Pair(nn.Module):
    """A [r, in(/tp)], to be filled, and B [out(/tp), r], zero, of one HF linear.

    Args:
        target: what it belongs to.
        inputs, outputs: of A and B on this rank.
        device: of both; they are fp32.
        source: B is whole on every rank, and these of its rows are in use here; None: all that it has.
    """

    source: Tensor | None

    def __init__(self, target: Target, inputs: int, outputs: int, device: Any, source: Tensor | None):
        super().__init__()
        self.r, self.scaling, self.dropout = target.r, target.scaling, target.dropout
        self.a = nn.Parameter(torch.empty(target.r, inputs, device=device))
        self.b = nn.Parameter(torch.zeros(outputs, target.r, device=device))
        self.register_buffer("source", None if source is None else source.to(device), persistent=False)


class LowRank(nn.ModuleDict):
    """All pairs of one linear, by the last name of their HF linear.

    Args:
        at: how the linear lies.
        device: of its weight.
        pairs: in any order.
        places: int64, where the outputs of each pair lie among those of the linear on this rank.
        outputs: of the linear on this rank.
    """

    order: Tensor | None

    def __init__(self, at: Place, device: Any, pairs: Mapping[str, Pair], places: Sequence[Tensor], outputs: int):
        super().__init__(pairs)
        self.place = at
        place = torch.cat(list(places))
        rest = torch.ones(outputs, dtype=torch.bool)
        rest[place] = False
        order = torch.cat([place, rest.nonzero()[:, 0]]).argsort()
        straight = torch.equal(order, torch.arange(outputs))
        self.num_rest = int(rest.sum())
        self.register_buffer("order", None if straight else order.to(device), persistent=False)
        for pair in pairs.values():
            self.place.mark(pair.a, pair.b)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Adds the pairs to what the linear made of ``x``."""
        return (output + self.up(self.down(x))).to(output.dtype)

    def down(self, x: Tensor) -> Tensor:
        """scaling * A dropout(x) of all pairs: [T, 1, sum of r], whole where B needs it."""
        pairs = list(self._pairs())
        x = x.to(pairs[0].a.dtype)
        a = [pair.a * pair.scaling for pair in pairs]
        if self.training and any(pair.dropout for pair in pairs):
            low = torch.cat([F.linear(self._drop(x, pair), rows) for pair, rows in zip(pairs, a)], -1)
        else:
            low = F.linear(x, torch.cat(a))
        return self.place.exchange(low)

    def up(self, low: Tensor) -> Tensor:
        """B of all pairs: [T, 1, sum of r] -> [T, 1, outputs of this rank]; zero where no pair is."""
        pairs = list(self._pairs())
        parts = [part @ self._b(pair).t() for part, pair in zip(low.split([p.r for p in pairs], -1), pairs)]
        if self.num_rest:
            parts.append(low.new_zeros(*low.shape[:-1], self.num_rest))
        delta = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return delta if self.order is None else delta.index_select(-1, self.order)

    def head_factors(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(low [T, 1, r] of the whole row, B [V / tp, r]) of a linear with one pair, the head."""
        (pair,) = self._pairs()
        return self.down(hidden), pair.b

    def _pairs(self) -> Iterator[Any]:
        return iter(self.values())

    def _b(self, pair: Any) -> Tensor:
        if pair.source is None:
            return pair.b
        # Other ranks use other rows: their gradients are summed.
        return copy_to_tensor_model_parallel_region(pair.b, group=self.place.group)[pair.source]

    def _drop(self, x: Tensor, pair: Any) -> Tensor:
        # Ranks draw alike where they hold the same, and apart where they hold other features or tokens.
        with get_cuda_rng_tracker().fork() if self.place.draws_apart else nullcontext():
            return F.dropout(x, pair.dropout, self.training)


def apply_lora(model: Model, plan: PeftPlan, seed: int) -> Model:
    """Adds the plan's pairs to a model's stages and freezes everything that the plan does not train.

    To be called between ``load_model`` and ``wrap_model``. A is drawn whole from a generator of its own, keyed by ``seed`` and
    the HF name, and then cut: what a model starts from does not depend on the layout. B is zero.

    Args:
        model: its weights loaded or not.
        plan: of ``make_plan``.
        seed: of the run.

    Returns:
        The model with the pairs in its weight map; a checkpoint holds what trains.
    """
    by_linear: dict[str, list[Target]] = defaultdict(list)
    for target in plan.targets:
        by_linear[target.linear].append(target)
    topology = model.topology
    mapping = adapter_mapping(model.mapping, plan, topology.tp)
    entries = mapping.by_name()
    for stage in model:
        for name, linear in list(global_named_modules(stage)):
            if name in by_linear:
                _add_pairs(linear, by_linear[name], entries, topology, plan.init, seed)
        stage.requires_grad_(False)
        for name, parameter in global_named_parameters(stage):
            if name in plan.names and not name.startswith(NEVER_RUN):
                parameter.requires_grad_()
                if name in plan.biases:
                    _train_parts(parameter, plan.bias_entries[name], entries[name].split, plan.biases[name], topology)
        mark_sharding(stage, mapping)
    return dataclasses.replace(model, mapping=mapping, saved=trained_mapping(model.mapping, plan, topology.tp))


def fill(model: Model, tensors: Mapping[str, Tensor]) -> None:
    """Copies full tensors (by global name, in the order of rows of the weight map) into this rank's parameters of those names."""
    entries, topology = model.mapping.by_name(), model.topology
    for name, parameter in model.named_parameters():
        if name in tensors:
            put(parameter, entries[name].split.shard(tensors[name], topology.tp, topology.tp_rank))


def _add_pairs(
    linear: Any, targets: Sequence[Target], entries: Mapping[str, Entry], topology: Topology, init: str, seed: int
) -> None:
    """Makes the pairs of one linear and hooks them in."""
    at = Place.of(linear)
    if at is None:
        raise ConfigError(
            f"peft.target_modules: {targets[0].hf_module} is a {type(linear).__name__}, which takes no pair"
        )
    tp, rank, device = topology.tp, topology.tp_rank, linear.weight.device
    split = entries[targets[0].entry.name].split
    pairs, places = {}, []
    for target in targets:
        rows = local_rows(target, split, tp, rank)
        whole = not shared_evenly(target, split, tp)
        inputs = target.inputs // tp if split.dim == 1 else target.inputs
        outputs = target.shape[0] if whole else len(rows.place)
        pair = pairs[target.key] = Pair(target, inputs, outputs, device, rows.source if whole else None)
        places.append(rows.place)
        if device.type != "meta":
            pair.a.data.copy_(entries[f"{target.name}.a"].split.shard(draw(target, init, seed), tp, rank))
    full = split.padded(targets[0].full_rows, tp)
    linear.lora = LowRank(at, linear.weight.device, pairs, places, full // tp if split.dim == 0 else full)


def draw(target: Target, init: str, seed: int) -> Tensor:
    """A whole A [r, in], fp32: PEFT's distributions (``kaiming_uniform_`` with a = sqrt 5, or N(0, 1 / r))."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "lora", target.hf_module))
    shape = target.r, target.inputs
    if init == "gaussian":
        return torch.randn(shape, generator=generator) / target.r
    return (2 * torch.rand(shape, generator=generator) - 1) / target.inputs**0.5


def _train_parts(bias: Tensor, entry: Entry, split: Split, parts: Sequence[str], topology: Topology) -> None:
    """Keeps those rows of a fused bias fixed whose HF bias is not among ``parts``."""
    if len(parts) == len(entry.hf):
        return
    rows = bias.shape[0] * (topology.tp if split.dim == 0 else 1)
    sizes = [len(part) for part in entry.from_full(torch.empty(rows, device="meta"))]
    full = entry.to_full([torch.full((size,), float(hf in parts)) for hf, size in zip(entry.hf, sizes)])
    mask = split.shard(full, topology.tp, topology.tp_rank).to(bias.device, bias.dtype)
    bias.register_hook(lambda gradient: gradient * mask)
    bias.trained_rows = mask  # type: ignore[attr-defined] # where the hook is lost: training/optimizer/sharded.py
