"""The host's memory beside a device, and the streams that copies between the two run in.

On the CPU both are one. Host buffers are then made by numpy, so that what torch's allocator hands out is the device's share and
the rest the host's: by this tests count, without a GPU, what a device would hold.
"""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy
import torch
from torch import Tensor


def host_empty(size: Sequence[int], dtype: torch.dtype, device: torch.device, *, locked: bool = True) -> Tensor:
    """A tensor in the host's memory beside ``device``; ``locked``: page-locked where that is a GPU, for copies from and to it."""
    if device.type == "meta":
        return torch.empty(0)  # nothing is kept of what has no data (training/memory/trace.py)
    if device.type == "cuda" and locked:
        return torch.empty(size, dtype=dtype, pin_memory=True)
    numel = torch.Size(size).numel()
    count = max(1, numel) * dtype.itemsize  # torch cannot view an empty one as another dtype
    return torch.from_numpy(numpy.empty(count, numpy.uint8)).view(dtype)[:numel].view(size)


def empty_beside(tensor: Tensor, on_host: bool) -> Tensor:
    """A tensor like ``tensor``, of its side; on the host nothing travels from or to it."""
    return host_empty(tensor.shape, tensor.dtype, tensor.device, locked=False) if on_host else torch.empty_like(tensor)


def send(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor on ``device``, without a wait for what that is at work on."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def fetch(tensor: Tensor) -> tuple[Tensor, Any]:
    """A tensor on its way to the host, and the event of its arrival; None where it is there."""
    if tensor.device.type != "cuda":
        return tensor, None
    there = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    return there, torch.cuda.current_stream().record_event()


@functools.cache
def copy_stream(device: torch.device, name: str = "") -> Any:
    """A stream of copies of this process, by name; None where there is no GPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def on_stream(stream: Any) -> AbstractContextManager:
    """Runs a block in ``stream``, after what the current one was given so far."""
    if stream is None:
        return nullcontext()
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)
