"""NF4 in plain torch, value by value what bitsandbytes computes: the oracle that tests hold it against, on the CPU and on CUDA.

The rules are those of bitsandbytes 0.50.2, backends/default/ops.py and, for 8-bit codes on the CPU, csrc/cpu_ops.cpp.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vlm.weights.nf4.tensor import BLOCK, GROUP, Nf4Tensor, absmax_of, dynamic_map

_LOOKUP = 1 << 16
"""Entries of bitsandbytes' table of nearest 8-bit codes on the CPU (csrc/cpu_ops.cpp, ``build_quantize_lut``)."""

TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values: quantiles of a normal distribution (bitsandbytes, ``create_normal_map``)."""


def quantise(weight: Tensor, *, double: bool) -> Nf4Tensor:
    """As ``weights.nf4.quantise``."""
    codes, absmax = _quantise_4bit(weight.reshape(-1))
    if not double:
        return Nf4Tensor(shape=tuple(weight.shape), codes=codes, absmax=absmax)
    offset = absmax.mean()
    codes_8bit, scales = _quantise_8bit(absmax - offset)
    return Nf4Tensor(shape=tuple(weight.shape), codes=codes, absmax=codes_8bit, scales=scales, offset=offset.reshape(1))


def block_values(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``weights.nf4.block_values``."""
    values = F.embedding(codes.int(), _pairs(absmax.device)).view(-1, BLOCK)
    return (values * absmax[:, None]).to(dtype)


def dequantise(
    tensor: Nf4Tensor, dtype: torch.dtype, by: Callable[[Tensor, Tensor, torch.dtype], Tensor] = block_values
) -> Tensor:
    """The whole tensor; ``by`` computes its blocks."""
    absmax = tensor.absmax
    if tensor.scales is not None and tensor.offset is not None:
        group = torch.arange(tensor.num_blocks, device=absmax.device) // GROUP
        absmax = absmax_of(absmax, tensor.scales[group], tensor.offset)
    flat = by(tensor.blocks(), absmax, dtype).view(-1)
    return flat[: torch.Size(tensor.shape).numel()].view(tensor.shape)


def _quantise_4bit(values: Tensor) -> tuple[Tensor, Tensor]:
    """Floating point [n] -> codes uint8 [n / 2], absmax fp32 [n / 64], both rounded up."""
    whole = values.numel() // BLOCK * BLOCK
    blocks, rest = values[:whole].float().view(-1, BLOCK), values[whole:].float()
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1).view(-1)
    if len(rest):  # divided, not multiplied by the inverse
        last = rest.abs().amax().clamp(min=1e-38).view(1)
        absmax, scaled = torch.cat([absmax, last]), torch.cat([scaled, (rest / last).clamp_(-1, 1)])
    if len(scaled) % 2:
        scaled = F.pad(scaled, (0, 1))
    table = _table(values.device)
    codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)
    return codes[::2] << 4 | codes[1::2], absmax


def _quantise_8bit(values: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [n] -> codes uint8 [n] of ``dynamic_map``, absmax fp32 [n / 256] rounded up."""
    groups = F.pad(values, (0, -len(values) % GROUP)).view(-1, GROUP)
    absmax = groups.abs().amax(1)
    scaled = (groups * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    if values.device.type == "cpu":
        place = (scaled + 1.0) * 0.5 * (_LOOKUP - 1) + 0.5
        codes = _nearest_codes()[place.int()]
        codes[absmax == 0] = 0
    else:
        codes = torch.bucketize(scaled, _bounds(dynamic_map(values.device)), out_int32=True).to(torch.uint8)
    return codes.view(-1)[: len(values)], absmax


def _bounds(table: Tensor) -> Tensor:
    return 0.5 * (table[:-1] + table[1:])


@functools.cache
def _nearest_codes() -> Tensor:
    """Of numbers from -1 to 1 rounded to 16 bits, the nearest 8-bit codes."""
    numbers = -1.0 + 2.0 * torch.arange(_LOOKUP, dtype=torch.float32, device="cpu") / (_LOOKUP - 1)
    return torch.searchsorted(_bounds(dynamic_map(torch.device("cpu"))), numbers).to(torch.uint8)


@functools.cache
def _table(device: torch.device) -> Tensor:
    return torch.tensor(TABLE, dtype=torch.float32, device="cpu").to(device)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """The two values of each byte of codes, fp32 [256, 2]."""
    table, byte = _table(device), torch.arange(256, device=device)
    return torch.stack([table[byte >> 4], table[byte & 15]], 1)
