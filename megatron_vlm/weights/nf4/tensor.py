"""NF4 (QLoRA, arXiv 2305.14314) of whole tensors, bit for bit that of bitsandbytes 0.50.2.

    weight, flattened --blocks of 64--> codes (4 bits each), absmax of each block (fp32)
    absmax - their mean --groups of 256 blocks--> 8-bit codes, absmax of each group (fp32)      double quantisation
    value = table[code] * absmax, in fp32, rounded once to the dtype that is wanted

Bits per parameter: 4 + 32/64 = 4.5, with double quantisation 4 + 8/64 + 32/(64 * 256) = 4.127. bitsandbytes computes it, on the
CPU too; testing/nf4_oracle.py says the same in plain torch. What equals what, measured (tests/weights/nf4/test_tensor.py):

    codes, absmax, values     on the CPU and on CUDA the same bounds and the same table
    8-bit codes, CPU          the nearest value, looked up by the number rounded to 16 bits: not the nearest one in 1 to 3 of
                              1000 cases
    8-bit codes, CUDA         the exact nearest one
    mean of the absmax        as torch sums: on the CPU it depends on the number of threads in the last bit, and CUDA's
                              differs from it, so double-quantised values of two machines may differ by that much

bitsandbytes' own traps on the CPU are kept out: whole blocks are dequantised as [blocks, 64], never as rows of another
length (its AVX-512 kernel restarts blocks in each row), and its Linear4bit, which repacks weights in place, is not used.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError

BLOCK = 64
"""Values that share a scale."""
GROUP = 256
"""Blocks that share a scale of their 8-bit scales."""
_CHUNK = 1 << 22
"""Values quantised at a time: temporary memory is about 16 bytes for each of them."""


@dataclass(frozen=True, kw_only=True)
class Quantization(Config):
    """Which weights are kept in 4 bits, and how.

    Attributes:
        format: the only one.
        double_quant: the scales of blocks are kept in 8 bits.
        groups: parts of the model whose linears are quantised: llm, vision, connector. The LM head never is.
        dtype: what weights are cast to before, and computed in.
        backend: what made the codes, for readers.
    """

    format: Literal["nf4"] = "nf4"
    double_quant: bool = True
    groups: tuple[str, ...] = ("llm",)
    dtype: Literal["fp32", "bf16", "fp16"]
    backend: str | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        for group in self.groups:
            if group not in ("llm", "vision", "connector"):
                raise ConfigError(f"cannot quantise {group!r}: it is none of llm, vision, connector")


@dataclass(frozen=True, kw_only=True)
class Nf4Tensor:
    """A whole tensor in NF4, its blocks over the flattened tensor.

    Attributes:
        shape: of the tensor.
        codes: uint8 [n / 2], rounded up; the first of two values in the high half.
        absmax: one per block, rounded up: fp32, or uint8 with double quantisation.
        scales: fp32, absmax of each group of 256 blocks; None without double quantisation.
        offset: fp32 [1], mean of the absmax; None likewise.
    """

    shape: tuple[int, ...]
    codes: Tensor
    absmax: Tensor
    scales: Tensor | None = None
    offset: Tensor | None = None

    @classmethod
    def on_meta(cls, shape: tuple[int, ...], *, double: bool) -> "Nf4Tensor":
        """One of that shape without values."""
        numel = math.prod(shape)
        blocks = -(-numel // BLOCK)
        empty = partial(torch.empty, device="meta")
        codes = empty(-(-numel // 2), dtype=torch.uint8)
        if not double:
            return cls(shape=shape, codes=codes, absmax=empty(blocks))
        absmax = empty(blocks, dtype=torch.uint8)
        return cls(shape=shape, codes=codes, absmax=absmax, scales=empty(-(-blocks // GROUP)), offset=empty(1))

    @property
    def num_blocks(self) -> int:
        return self.absmax.numel()

    def parts(self) -> dict[str, Tensor]:
        """What is stored, by name."""
        found = {"codes": self.codes, "absmax": self.absmax, "scales": self.scales, "offset": self.offset}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to(self, device: Any) -> "Nf4Tensor":
        """On another device."""
        return Nf4Tensor(shape=self.shape, **{name: part.to(device) for name, part in self.parts().items()})

    def blocks(self) -> Tensor:
        """Codes of whole blocks, uint8 [blocks, 32]; what follows the last value has the code of zero."""
        missing = self.num_blocks * BLOCK // 2 - self.codes.numel()
        codes = F.pad(self.codes, (0, missing), value=0x77) if missing else self.codes
        return codes.view(self.num_blocks, BLOCK // 2)


@functools.cache
def _library(device_type: str) -> Any:
    """bitsandbytes' functions, tried on a kind of device.

    Raises:
        ConfigError: it is not installed, or does not run there.
    """
    try:
        import bitsandbytes.functional as library

        probe = torch.linspace(-1, 1, 2 * BLOCK, device=device_type)
        library.quantize_4bit(probe, blocksize=BLOCK, quant_type="nf4")
    except Exception as error:  # a missing package, a library that does not load, a device without kernels
        raise ConfigError(
            f"linears in 4 bits need bitsandbytes, which does not run on {device_type} ({type(error).__name__}: {error}): "
            "install it (pip install 'megatron_vlm[qlora]'), or leave peft.quantize (--quantize) out"
        ) from error
    return library


def quantise(weight: Tensor, *, double: bool) -> Nf4Tensor:
    """Quantises a whole tensor of 16- or 32-bit floats, in its own dtype, on its own device.

    Args:
        weight: cast to the dtype of the run before: that is what transformers quantises.
        double: quantise the scales of blocks as well.

    Raises:
        ConfigError: bitsandbytes does not run on the device.
    """
    library, codes, absmax = _library(weight.device.type), [], []
    for chunk in weight.detach().reshape(-1).split(_CHUNK):
        packed, state = library.quantize_4bit(chunk, blocksize=BLOCK, quant_type="nf4")
        codes.append(packed.view(-1))
        absmax.append(state.absmax)
    tensor = Nf4Tensor(shape=tuple(weight.shape), codes=torch.cat(codes), absmax=torch.cat(absmax))
    if not double:
        return tensor
    offset = tensor.absmax.mean()
    codes_8bit, state = library.quantize_blockwise(tensor.absmax - offset, blocksize=GROUP)
    return dataclasses.replace(tensor, absmax=codes_8bit, scales=state.absmax, offset=offset.reshape(1))


def block_values(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes uint8 [blocks, 32], absmax fp32 [blocks] -> values [blocks, 64]."""
    library, shape = _library(codes.device.type), torch.Size((len(absmax), BLOCK))
    state = library.QuantState(absmax, shape=shape, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
    return library.dequantize_4bit(codes.view(-1, 1), state)


def absmax_of(codes: Tensor, scales: Tensor, offset: Tensor) -> Tensor:
    """The fp32 absmax of blocks from their 8-bit codes, the scales of their groups, and their tensors' offsets."""
    return dynamic_map(codes.device)[codes.int()] * scales + offset


@functools.cache
def dynamic_map(device: torch.device) -> Tensor:
    """The 256 values of 8-bit codes, fp32, rising: 7 decades on either side of zero (arXiv 1511.04561).

    Source: bitsandbytes, functional.py, ``create_dynamic_map``.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        means = 10 ** (decade - 6) * ((bounds[:-1] + bounds[1:]) / 2.0)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu").to(device)
