"""Attention over packed rows: one function, several kernels, no attention across segments.

    attention(q, k, v, cu_q, cu_k, max_q, max_k, causal, window)
        CPU, and fp32 anywhere -> per-segment SDPA, equal neighbours batched (the exact one, the oracle of the tests)
        CUDA bf16 and fp16     -> the newest of FlashAttention 3, 2 and torch's own that is installed and knows the device

Shapes: Tq, Tk tokens of the row; H heads, G key/value heads (H % G == 0), D dimension of a head.
``choose`` (``model.attention``) or MEGATRON_VLM_ATTENTION names one of BACKENDS instead, FlashAttention 4 as well: it takes heads
of some sizes only, which depend on the device.
"""

import functools
import importlib.util
import itertools
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vlm.errors import ConfigError, nearest
from megatron_vlm.log import get_logger

log = get_logger(__name__)

BACKENDS = ("flash_attn_4", "flash_attn_3", "flash_attn", "torch_varlen", "segments")  # the newest first
_MODULES = {
    "flash_attn_4": ("flash_attn.cute.interface", "flash-attn-4"),
    "flash_attn_3": ("flash_attn_interface", "flash-attn-3"),
    "flash_attn": ("flash_attn.flash_attn_interface", "flash-attn"),  # FlashAttention 4 alone makes a flash_attn, too
}
_SWITCHES = {"flash_attn_4": ("FA4", (9, 10)), "flash_attn_3": ("FA3", (9,))}
"""torch's switch puts these below ``varlen_attn``, for the whole process; compute capabilities that they know."""
_chosen = "auto"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool = False,
    window: int | None = None,
    head_multiple: int = 1,
) -> Tensor:
    """Scaled dot product attention of each query segment over the key segment of the same number.

    Args:
        q: [Tq, H, D].
        k, v: [Tk, G, D]; heads are not repeated.
        cu_q, cu_k: int32 [N + 1], starts of the segments and the total at the end.
        max_q, max_k: longest segment, on the host.
        causal: mask keys after the query; with unequal lengths the ends are aligned (bottom right).
        window: keys a query sees up to itself, itself included; None: all. Without ``causal`` it sees those after it as well.
        head_multiple: heads are filled with zeros to a multiple of this, where a kernel is made for such sizes; scores and
            output are the same.

    Returns:
        [Tq, H, D].
    """
    if window is not None and window >= max_k:
        window = None
    lengths, dim = (cu_q, cu_k, max_q, max_k), q.shape[-1]
    if filler := -dim % head_multiple:
        q, k, v = (F.pad(x, (0, filler)) for x in (q, k, v))
        return _attend(q, k, v, lengths, causal, window, dim**-0.5)[..., :dim]
    return _attend(q, k, v, lengths, causal, window, None)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[Any, ...], causal: bool, window: int | None, scale: float | None
) -> Tensor:
    backend = select_backend(q.device.type, q.dtype)
    if backend == "segments":
        return _segments(q, k, v, lengths[0], lengths[1], causal, window, scale)
    left, right = (-1 if window is None else window - 1), (0 if causal else -1)
    if backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        sides = (left, right if window is not None else -1)
        return flash_attn_varlen_func(q, k, v, *lengths, softmax_scale=scale, causal=causal, window_size=sides)
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] and _torch_varlen_checks_heads() else {}
    output: Any = varlen_attn(q, k, v, *lengths, scale=scale, window_size=(left, right), **options)
    return output


def choose(kernel: str, device_type: str, dtype: torch.dtype) -> str:
    """Sets which kernel this process attends with, and returns it.

    Args:
        kernel: one of BACKENDS, or auto.
        device_type, dtype: of the model.

    Raises:
        ConfigError: it cannot run here, or MEGATRON_VLM_ATTENTION says another.
    """
    global _chosen
    _chosen = kernel
    select_backend.cache_clear()
    return select_backend(device_type, dtype)


@functools.cache
def select_backend(device_type: str, dtype: torch.dtype) -> str:
    """Picks the kernel for a device and dtype, once per process.

    Raises:
        ConfigError: a kernel is asked for that is unknown or cannot run here.
    """
    variable = os.environ.get("MEGATRON_VLM_ATTENTION") or "auto"
    if "auto" not in (variable, _chosen) and variable != _chosen:
        raise ConfigError(f"MEGATRON_VLM_ATTENTION={variable}, but model.attention={_chosen}: say one of them")
    setting, wanted = ("MEGATRON_VLM_ATTENTION", variable) if variable != "auto" else ("model.attention", _chosen)
    if wanted == "auto":
        found = next(kernel for kernel in BACKENDS[1:] if _missing(kernel, device_type, dtype) is None)
        if device_type == "cuda":
            log.info("attention runs on %s", found)
        return found
    if wanted not in BACKENDS:
        raise ConfigError(f"{setting}={wanted!r} is not a backend{nearest(wanted, BACKENDS)}")
    if missing := _missing(wanted, device_type, dtype):
        raise ConfigError(f"{setting}={wanted} {missing}")
    return wanted


def _missing(kernel: str, device_type: str, dtype: torch.dtype) -> str | None:
    """What a kernel lacks here; None: nothing, and torch's switch is set for it."""
    if kernel == "segments":
        return None
    if device_type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return f"needs a CUDA device and bf16 or fp16, got {device_type} {dtype}"
    if kernel in _SWITCHES and (major_minor := torch.cuda.get_device_capability())[0] not in _SWITCHES[kernel][1]:
        known = " or ".join(f"{number}.x" for number in _SWITCHES[kernel][1])
        return "needs a GPU of compute capability {}, this one has {}.{}".format(known, *major_minor)
    return (_not_installed(*_MODULES[kernel]) if kernel in _MODULES else None) or _switch(kernel)


def _not_installed(module: str, package: str) -> str | None:
    try:  # imports the packages above it
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    except Exception as error:  # whatever a package made for other versions raises
        return _unusable(package, error)
    return None if found else f"needs the package {package}, which is not installed"


def _unusable(package: str, error: Exception) -> str:
    log.warning("%s is installed, but torch cannot use it: %s", package, error)
    return f"is installed, but torch cannot use it: {error}"


def _switch(kernel: str) -> str | None:
    """Has ``varlen_attn`` run this kernel; why it cannot, or None."""
    from torch.nn import attention as switches

    current = getattr(switches, "current_flash_attention_impl", lambda: None)()
    name = _SWITCHES[kernel][0] if kernel in _SWITCHES else None
    if name is None:
        if current is not None:
            switches.restore_flash_attention_impl()
        return None
    if not hasattr(switches, "activate_flash_attention_impl"):
        return f"needs a newer torch than {torch.__version__}, whose attention cannot be switched to it"
    if current != name:
        try:
            switches.activate_flash_attention_impl(name)
        except Exception as error:
            return _unusable(_MODULES[kernel][1], error)
    return None


@functools.cache
def _torch_varlen_checks_heads() -> bool:
    """torch 2.12 and later want ``enable_gqa`` said; torch 2.11 does not know the argument."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """Dense SDPA for each run of neighbouring segments of equal lengths."""
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    lengths = [(q1 - q0, k1 - k0) for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:])]
    outputs = []
    index = 0
    for (length_q, length_k), run in itertools.groupby(lengths):
        count = len(list(run))
        first_q, first_k = starts_q[index], starts_k[index]
        index += count
        if length_q == 0:
            continue
        query, key, value = (
            x[start : start + count * length].view(count, length, *x.shape[1:]).transpose(1, 2)
            for x, start, length in ((q, first_q, length_q), (k, first_k, length_k), (v, first_k, length_k))
        )
        output = _dense(query, key, value, causal=causal, window=window, scale=scale)
        outputs.append(output.transpose(1, 2).reshape(count * length_q, *q.shape[1:]))
    return torch.cat(outputs) if len(outputs) != 1 else outputs[0]


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float | None) -> Tensor:
    """[n, H, Lq, D] x [n, G, Lk, D] -> [n, H, Lq, D]."""
    length_q, length_k = q.shape[2], k.shape[2]
    if window is not None and window >= length_k:
        window = None
    gqa = q.shape[1] != k.shape[1]
    if window is None and (not causal or length_q == length_k):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=gqa)
    mask = _mask(length_q, length_k, causal, window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)


def _mask(length_q: int, length_k: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """bool [Lq, Lk], True where a key is seen; ends aligned."""
    if device.type == "meta":  # training/memory/trace.py counts it where it is made
        return torch.empty((), dtype=torch.bool, device=device).expand(length_q, length_k)
    query = torch.arange(length_k - length_q, length_k, device=device)[:, None]
    key = torch.arange(length_k, device=device)[None]
    seen = key <= query if causal else key > query - length_k
    return seen if window is None else seen & (key > query - window)


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the host on ``device`` without a wait for what that is at work on, which only page-locked memory gives."""
    locks = device.type == "cuda" and tensor.is_cpu
    return (tensor.pin_memory() if locks else tensor).to(device, dtype, non_blocking=True)
