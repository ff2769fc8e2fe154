"""Attention over packed rows: one function, several kernels, no attention across segments.

    attention(q, k, v, cu_q, cu_k, max_q, max_k, causal, window)
        CPU, and fp32 anywhere -> per-segment SDPA, equal neighbours batched (the exact one, the oracle of the tests)
        CUDA bf16 and fp16     -> flash_attn's varlen kernel where it is installed, else torch's varlen_attn

Shapes: Tq, Tk tokens of the row; H heads, G key/value heads (H % G == 0), D dimension of a head.
``MEGATRON_VLM_ATTENTION`` = segments | torch_varlen | flash_attn overrides the choice.
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

BACKENDS = ("segments", "torch_varlen", "flash_attn")


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
) -> Tensor:
    """Scaled dot product attention of each query segment over the key segment of the same number.

    Args:
        q: [Tq, H, D].
        k, v: [Tk, G, D]; heads are not repeated.
        cu_q, cu_k: int32 [N + 1], starts of the segments and the total at the end.
        max_q, max_k: longest segment, on the host.
        causal: mask keys after the query; with unequal lengths the ends are aligned (bottom right).
        window: keys a query sees up to itself, itself included; None: all. Without ``causal`` it sees those after it as well.

    Returns:
        [Tq, H, D].
    """
    if window is not None and window >= max_k:
        window = None
    backend = select_backend(q.device.type, q.dtype)
    if backend == "segments":
        return _segments(q, k, v, cu_q, cu_k, causal, window)
    left, right = (-1 if window is None else window - 1), (0 if causal else -1)
    if backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, max_q, max_k, causal=causal, window_size=(left, right if window is not None else -1)
        )
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] and _torch_varlen_checks_heads() else {}
    output: Any = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(left, right), **options)
    return output


@functools.cache
def select_backend(device_type: str, dtype: torch.dtype) -> str:
    """Picks the kernel for a device and dtype, once per process.

    Raises:
        ConfigError: MEGATRON_VLM_ATTENTION names an unknown backend, or one that cannot run here.
    """
    half_on_cuda = device_type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    flash = importlib.util.find_spec("flash_attn") is not None
    wanted = os.environ.get("MEGATRON_VLM_ATTENTION")
    if wanted:
        if wanted not in BACKENDS:
            raise ConfigError(f"MEGATRON_VLM_ATTENTION={wanted!r} is not a backend{nearest(wanted, BACKENDS)}")
        if wanted != "segments" and not half_on_cuda:
            raise ConfigError(
                f"MEGATRON_VLM_ATTENTION={wanted} needs a CUDA device and bf16 or fp16, got {device_type} {dtype}"
            )
        if wanted == "flash_attn" and not flash:
            raise ConfigError("MEGATRON_VLM_ATTENTION=flash_attn, but the package flash-attn is not installed")
        return wanted
    if not half_on_cuda:
        return "segments"
    return "flash_attn" if flash else "torch_varlen"


@functools.cache
def _torch_varlen_checks_heads() -> bool:
    """torch 2.12 and later want ``enable_gqa`` said; torch 2.11 does not know the argument."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _segments(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, window: int | None) -> Tensor:
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
        output = _dense(query, key, value, causal=causal, window=window)
        outputs.append(output.transpose(1, 2).reshape(count * length_q, *q.shape[1:]))
    return torch.cat(outputs) if len(outputs) != 1 else outputs[0]


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None) -> Tensor:
    """[n, H, Lq, D] x [n, G, Lk, D] -> [n, H, Lq, D]."""
    length_q, length_k = q.shape[2], k.shape[2]
    if window is not None and window >= length_k:
        window = None
    gqa = q.shape[1] != k.shape[1]
    if window is None and (not causal or length_q == length_k):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
    mask = _mask(length_q, length_k, causal, window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)


def _mask(length_q: int, length_k: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """bool [Lq, Lk], True where a key is seen; ends aligned."""
    query = torch.arange(length_k - length_q, length_k, device=device)[:, None]
    key = torch.arange(length_k, device=device)[None]
    seen = key <= query if causal else key > query - length_k
    return seen if window is None else seen & (key > query - window)
