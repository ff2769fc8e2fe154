"""What sharded parameters take on top of their shards in a pass: the same allocations as torch's ``fully_shard``, without data.

    unit's pass --gathered [whole] + copied out [whole]--> output --(ZeRO-3: gone)--> backward: once more, and the next gathered
    its gradients [whole] --> fp32 for the reduction [whole], until the next unit's --> shards

Source: torch 2.13, distributed/fsdp/_fully_shard/_fsdp_param_group.py and _fsdp_collectives.py.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How parameters are cut.

    Attributes:
        ranks: that share them.
        keeps: whole from the forward to the backward pass.
        frees: whole ones go after a backward pass; False: they stay for the next microbatch.
        adds: shards of gradients are there already, of the microbatch before.
        reduced: bytes of a number in the reduction; None: as many as the parameter's.
        host: shards lie in the host's memory: they come to the device to be gathered, gradients leave it when they are summed.
        copies: device and host are not one.
    """

    ranks: int
    keeps: bool
    frees: bool
    adds: bool
    reduced: int | None
    host: bool = False
    copies: bool = False

    def numel(self, tensor: Tensor) -> int:
        """Elements that rank 0 holds of it, which is never fewer than another's."""
        return -(-len(tensor) // self.ranks) * tensor.shape[1:].numel() if tensor.dim() else tensor.numel()


@dataclass(eq=False)
class _Unit:
    parameters: list[nn.Parameter]
    whole: int
    reduction: int
    gathered: Tensor | None = None
    copied: Tensor | None = None
    waits: int = 0
    trained: list[nn.Parameter] = field(default_factory=list)


class Gathering:
    """Allocates, under a ``Meter``, what one microbatch of a stage gathers and reduces.

    Args:
        stage: ``VisionLanguageModel`` on meta.
        sharding: of it.
    """

    def __init__(self, stage: nn.Module, sharding: Sharding):
        self.stage, self.sharding = stage, sharding
        layers = [module for module in stage.modules() if isinstance(module, TransformerLayer)]
        seen: set[int] = set()
        self.units = {module: self._unit(module, seen) for module in (*layers, stage)}
        self.root = self.units[stage]
        self.order: list[_Unit] = []
        self.current: _Unit | None = None
        self.last: Tensor | None = None
        self.reducing: Tensor | None = None

    def install(self, stack: ExitStack) -> None:
        """Hooks it into the stage until ``stack`` closes."""
        for module, unit in self.units.items():
            stack.callback(module.register_forward_pre_hook(self._before(unit), prepend=True).remove)
            stack.callback(module.register_forward_hook(self._after(unit)).remove)
            for parameter in unit.trained:
                stack.callback(parameter.register_post_accumulate_grad_hook(self._accumulated(unit)).remove)

    def finish(self) -> None:
        """The end of the backward pass."""
        for unit in (self.current, self.root):
            if unit is not None:
                self._reduce(unit)
        self.reducing = None

    def _unit(self, module: nn.Module, seen: set[int]) -> _Unit:
        own = [p for p in module.parameters() if id(p) not in seen]
        codes = [b for b in module.buffers() if b.dtype == torch.uint8 and id(b) not in seen]
        seen |= {id(x) for x in (*own, *codes)}
        trained = [p for p in own if p.requires_grad]
        numbers = [
            self.sharding.numel(p) * self.sharding.ranks * (self.sharding.reduced or p.itemsize) for p in trained
        ]
        return _Unit(own, sum(x.nbytes for x in (*own, *codes)), sum(numbers), trained=trained)

    def _gather(self, unit: _Unit) -> None:
        cast = _bytes(sum(p.nbytes for p in unit.trained if p.itemsize < 4) // self.sharding.ranks)
        more = sum((4 - p.itemsize) * p.numel() for p in unit.trained)
        came = _bytes((unit.whole + more) // self.sharding.ranks if self.sharding.copies else 0)
        unit.gathered = _bytes(unit.whole)
        del cast, came

    def _before(self, unit: _Unit) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if unit.copied is None:
                if unit.gathered is None:
                    self._gather(unit)
                self.last = None
                unit.copied = _bytes(unit.whole)
                self.last, unit.gathered = unit.gathered, None  # until the next one is copied out

        return hook

    def _after(self, unit: _Unit) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            again = torch._C._current_graph_task_id() != -1
            if again or unit is self.root:  # what runs again is the root of a forward pass of its own
                self.last = None
            if not again:
                self.order.append(unit)
                if unit is not self.root and not self.sharding.keeps:
                    unit.copied = None
            for tensor in output if isinstance(output, tuple) else (output,):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._backward(unit))

        return hook

    def _backward(self, unit: _Unit) -> None:
        if self.current not in (None, unit, self.root):
            self._reduce(self.current)  # type: ignore[arg-type]
        self.current, unit.waits = unit, len(unit.trained)
        if unit.copied is None:
            if unit.gathered is None:
                self._gather(unit)
            unit.copied = _bytes(unit.whole)
            unit.gathered = None
        place = self.order.index(unit) - 1 if unit in self.order else -1
        if place >= 0 and self.order[place].copied is None and self.order[place].gathered is None:
            self._gather(self.order[place])

    def _accumulated(self, unit: _Unit) -> Any:
        def hook(parameter: nn.Parameter) -> None:
            unit.waits -= 1
            if not unit.waits and unit is not self.root:
                self._reduce(unit)

        return hook

    def _reduce(self, unit: _Unit) -> None:
        if self.current is unit:
            self.current = None
        if self.sharding.frees:
            unit.copied = None
        self.reducing = None
        if any(p.grad is not None for p in unit.trained):
            self.reducing = _bytes(unit.reduction)
            for parameter in unit.trained:
                parameter.grad = None
            there = self.sharding.adds or self.sharding.host
            shards = _bytes(unit.reduction // self.sharding.ranks) if there else None
            del shards


def cut_bytes(buffers: Iterator[Tensor], sharding: Sharding | None) -> int:
    """Bytes of buffers that a rank holds: codes in 4 bits are cut as parameters are."""
    return sum(sharding.numel(x) if sharding and x.dtype == torch.uint8 else x.nbytes for x in buffers)


def _bytes(count: int) -> Tensor:
    return torch.empty(-(-count // 4), dtype=torch.float32, device="meta")
