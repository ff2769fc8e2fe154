"""What autograd keeps of a forward pass: outputs of norms are made again, large tensors wait in the host's memory.

    op saves x --pack--> x | Remade: norm and its input | Waiting: x's storage on the host --unpack, in the backward pass--> x

A storage is copied once, however many tensors of it are saved. Parameters stay where they are, and so do small tensors. What was
saved last is wanted first: it waits on the device. Source of the hooks: torch.autograd.graph.saved_tensors_hooks.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vlm.parallel.host import copy_stream, host_empty, on_stream

LEAST = 1 << 16
"""Bytes of a storage that is worth a copy."""
AHEAD = 1 << 30
"""Bytes of a pass that are on the device although they are, or go, to the host: copies under way, in both directions."""


@dataclass(eq=False)
class Waiting:
    """A storage that waits on the host.

    Attributes:
        size: bytes.
        host: its content there; empty where the device is meta.
        here: its content on the device, while it is.
        make: an empty tensor like ``here``.
        copied: the event behind its last copy; None on the CPU.
        before: what was saved before it in the same pass.
    """

    size: int
    host: Tensor
    here: Tensor | None
    make: Callable[[], Tensor]
    copied: Any
    before: "Callable[[], Waiting | None]"

    def fetch(self) -> Tensor:
        """Its bytes on the device; those saved before it, which are wanted next, begin to come."""
        whole = self._bring()
        if self.copied is not None:
            earlier, budget = self.before(), AHEAD
            while earlier is not None and (budget := budget - earlier.size) > 0:
                earlier._bring()
                earlier = earlier.before()
            torch.cuda.current_stream().wait_event(self.copied)
        return whole

    def _bring(self) -> Tensor:
        if self.here is None:
            self.here = self.make()
            self.copied = self._copy(self.here, self.host, self.here)
        return self.here

    def _copy(self, to: Tensor, source: Tensor, here: Tensor) -> Any:
        """Copies in the stream of copies; returns the event behind it."""
        stream = copy_stream(here.device)
        with on_stream(stream):
            if not here.is_meta:
                to.copy_(source, non_blocking=True)
            if stream is None:
                return None
            here.record_stream(stream)
            return stream.record_event()

    def send(self) -> None:
        """Begins the copy to the host."""
        assert self.here is not None
        self.copied = self._copy(self.host, self.here, self.here)


@dataclass(eq=False)
class Remade:
    """A norm's output, as what it is made of."""

    norm: nn.Module
    packed: Any

    def fetch(self) -> Tensor:
        """The norm runs once more; the module's hooks do not."""
        with torch.no_grad():
            return self.norm.forward(_unpack(self.packed))


class SavedTensors:
    """Decides what is kept of each forward pass of a model.

    Args:
        model: whose parameters and buffers are never copied.
        offload: large tensors wait on the host.
        norms: modules x -> y whose output is made again.
    """

    def __init__(self, model: nn.Module, *, offload: bool, norms: Sequence[nn.Module] = ()):
        self.model, self.offload, self.used = weakref.ref(model), offload, offload or bool(norms)
        self._active = False
        self._own: set[int] = set()
        # Storage -> (weak reference to it, what became of it).
        self._known: dict[int, tuple[Callable[[], Any], Waiting | Remade]] = {}
        self._last: Callable[[], Waiting | None] = lambda: None
        self._under_way: deque[tuple[Callable[[], Waiting | None], int]] = deque()
        self._bytes = 0
        for norm in norms:
            norm.register_forward_hook(self._made)

    @contextmanager
    def of_a_pass(self) -> Iterator[None]:
        """Acts on what is saved in the block, where gradients are asked for."""
        if not (self.used and torch.is_grad_enabled()):
            yield
            return
        model = self.model()
        assert model is not None
        self._own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
        self._active, self._last = True, lambda: None
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._active = False
            self._known.clear()

    def keep(self, parameters: Iterable[Tensor]) -> None:
        """Leaves more parameters of the pass in work where they are."""
        if self._active:
            self._own |= {x.untyped_storage()._cdata for x in parameters}

    def _made(self, norm: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if self._active and torch.is_grad_enabled():
            storage = output.untyped_storage()
            made = Remade(norm, self._pack(inputs[0].detach()))
            self._known[storage._cdata] = (weakref.ref(storage), made)

    def _pack(self, x: Tensor) -> Any:
        storage = x.untyped_storage()
        reference, entry = self._known.get(storage._cdata, (None, None))
        if reference is None or reference() is not storage:  # another one at that address, gone by now
            if not self.offload or storage.nbytes() < LEAST or storage._cdata in self._own:
                return x
            entry = self._send(x, storage.nbytes())
            self._known[storage._cdata] = (weakref.ref(storage), entry)
        return entry, x.storage_offset(), x.shape, x.stride(), x.dtype

    def _send(self, x: Tensor, size: int) -> Waiting:
        count, device = size // x.dtype.itemsize, x.device
        make = partial(torch.empty, count, dtype=x.dtype, device=device)
        whole = x.as_strided((count,), (1,), 0)
        entry = Waiting(size, host_empty((count,), x.dtype, device), whole, make, None, self._last)
        entry.send()
        self._last = weakref.ref(entry)
        self._under_way.append((self._last, size))
        self._bytes += size
        while self._bytes > (AHEAD if device.type == "cuda" else 0):
            reference, size = self._under_way.popleft()
            self._bytes -= size
            oldest = reference()
            if oldest is not None:
                if oldest.copied is not None:
                    oldest.copied.synchronize()  # or the allocations of what runs ahead of the copies would know no bound
                oldest.here = None
        return entry


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    entry, offset, shape, stride, dtype = packed
    whole = entry.fetch()
    return (whole if whole.dtype == dtype else whole.view(dtype)).as_strided(shape, stride, offset)
