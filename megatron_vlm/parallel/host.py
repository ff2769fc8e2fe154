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
    count = torch.Size(size).numel() * dtype.itemsize
    return torch.from_numpy(numpy.empty(count, numpy.uint8)).view(dtype).view(size)


def empty_beside(tensor: Tensor, on_host: bool) -> Tensor:
    """A tensor like ``tensor``, of its side; on the host nothing travels from or to it."""
    return host_empty(tensor.shape, tensor.dtype, tensor.device, locked=False) if on_host else torch.empty_like(tensor)


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
