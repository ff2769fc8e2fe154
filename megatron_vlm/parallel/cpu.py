"""The few seams that megatron-core 0.16.1 needs to run without CUDA. Installed explicitly, never at import; not used on GPUs.

megatron-core writes its device as literals (``device="cuda"``), asks CUDA for streams and generators, and compares
``param.type()`` with names of CUDA tensor types. ``install()`` answers each of these for the CPU:

    torch.cuda.current_device          -> torch.device("cpu"); it is passed on as a device (RoPE, p2p, DDP buffers)
    torch.zeros(..., device="cuda")    -> the same on the CPU; meta and other devices pass untouched
    synchronize, streams, empty_cache  -> nothing to wait for
    CUDA generator state               -> the CPU generator, which draws every number here
    Tensor.cuda, Module.cuda           -> identity
    Tensor.type() without arguments    -> the CUDA name, which the optimizers compare with
"""

import functools
from typing import Any

import torch
from torch.utils._device import _device_constructors

_FACTORIES = (
    "zeros", "ones", "empty", "tensor", "full", "arange", "rand", "randn", "zeros_like", "ones_like", "empty_like", "rand_like",
)  # fmt: skip
_installed = False


def install() -> None:
    """Installs the seams in this process; a second call does nothing.

    Raises:
        RuntimeError: CUDA is in use already, which the seams would break.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_initialized():
        raise RuntimeError("the CPU seams cannot be installed in a process that has initialised CUDA")
    _installed = True
    _patch_cuda_module()
    _patch_generators()
    _patch_tensors()


def _patch_cuda_module() -> None:
    cuda: Any = torch.cuda
    cpu = torch.device("cpu")
    cuda.current_device = lambda: cpu
    for name in ("synchronize", "empty_cache", "current_stream", "default_stream", "set_device"):
        setattr(cuda, name, lambda *args, **kwargs: None)


def _patch_generators() -> None:
    import megatron.core.tensor_parallel.random as mcore_random

    cuda: Any = torch.cuda
    generators: Any = mcore_random
    cuda.manual_seed = torch.default_generator.manual_seed
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    generators._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    generators._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _patch_tensors() -> None:
    # `with torch.device("meta")`, which from_pretrained loads under, finds the factories in a set made at its first use: it
    # must hold the real ones, or rotary tables of transformers models come back uninitialised.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    module: Any = torch.nn.Module
    tensor.cuda = lambda self, *args, **kwargs: self
    module.cuda = lambda self, *args, **kwargs: self
    original = torch.Tensor.type

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        name = original(self)
        return name.replace("torch.", "torch.cuda.", 1) if self.device.type == "cpu" else name

    tensor.type = tensor_type


def _on_cpu(factory: Any) -> Any:
    """Wraps a factory function so that a CUDA device asked for by name means the CPU."""

    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and (device.type if isinstance(device, torch.device) else str(device)).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapped
