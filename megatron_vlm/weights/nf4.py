"""NF4 (QLoRA, arXiv 2305.14314) of whole tensors, bit for bit that of bitsandbytes 0.50.2.

    weight, flattened --blocks of 64--> codes (4 bits each), absmax of each block (fp32)
    absmax - their mean --groups of 256 blocks--> 8-bit codes, absmax of each group (fp32)      double quantisation
    value = TABLE[code] * absmax, in fp32, rounded once to the dtype that is wanted

Bits per parameter: 4 + 32/64 = 4.5, with double quantisation 4 + 8/64 + 32/(64 * 256) = 4.127. Two backends stand behind one
border: bitsandbytes where it runs, else plain torch. What equals what, measured (tests/weights/test_nf4.py):

    codes, absmax, values     both backends, on the CPU; CUDA's kernels use the same bounds and the same table
    8-bit codes, CPU          both backends: bitsandbytes looks the nearest value up by the number rounded to 16 bits, and
                              so do we there. It is not the nearest one in 1 to 3 of 1000 cases
    8-bit codes, CUDA         the exact nearest one, in both
    mean of the absmax        as torch sums: on the CPU it depends on the number of threads in the last bit, and CUDA's
                              differs from it, so double-quantised values of two machines may differ by that much

bitsandbytes' own traps on the CPU are kept out: whole blocks are dequantised as [blocks, 64], never as rows of another
length (its AVX-512 kernel restarts blocks in each row), and its Linear4bit, which repacks weights in place, is not used.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.log import get_logger

BLOCK = 64
"""Values that share a scale."""
GROUP = 256
"""Blocks that share a scale of their 8-bit scales."""
NAMES = ("bitsandbytes", "torch")
_CHUNK = 1 << 22
"""Values quantised at a time: temporary memory is about 16 bytes for each of them."""
_LOOKUP = 1 << 16
"""Entries of bitsandbytes' table of nearest 8-bit codes on the CPU (csrc/cpu_ops.cpp, ``build_quantize_lut``)."""

TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values: quantiles of a normal distribution (bitsandbytes, ``create_normal_map``)."""


@dataclass(frozen=True, kw_only=True)
class Quantization(Config):
    """Which weights are kept in 4 bits, and how.

    Attributes:
        format: the only one.
        double_quant: the scales of blocks are kept in 8 bits.
        groups: parts of the model whose linears are quantised: llm, vision, connector. The LM head never is.
        dtype: what weights are cast to before, and computed in.
        backend: what computes it, one of ``NAMES``; None: what runs.
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


class Backend(Protocol):
    """What computes NF4."""

    name: str

    def quantise(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Floating point [n] -> codes uint8 [n / 2], absmax fp32 [n / 64], both rounded up."""

    def quantise_8bit(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 [n] -> codes uint8 [n] of ``dynamic_map``, absmax fp32 [n / 256] rounded up."""

    def dequantise(self, codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        """Codes uint8 [blocks, 32], absmax fp32 [blocks] -> values [blocks, 64]."""


class TorchBackend:
    """Plain torch."""

    name = "torch"

    def quantise(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Backend``. The rules are those of bitsandbytes' backends/default/ops.py."""
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

    def quantise_8bit(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Backend``."""
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

    def dequantise(self, codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``Backend``."""
        values = F.embedding(codes.int(), _pairs(codes.device)).view(-1, BLOCK)
        return (values * absmax[:, None]).to(dtype)


class BitsAndBytesBackend:
    """The functions of bitsandbytes.

    Raises:
        ImportError: it is not installed.
    """

    name = "bitsandbytes"

    def __init__(self) -> None:
        import bitsandbytes.functional

        self._functional = bitsandbytes.functional

    def quantise(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Backend``."""
        codes, state = self._functional.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
        return codes.view(-1), state.absmax

    def quantise_8bit(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Backend``."""
        codes, state = self._functional.quantize_blockwise(values, blocksize=GROUP)
        return codes, state.absmax

    def dequantise(self, codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``Backend``."""
        shape = torch.Size((len(absmax), BLOCK))
        state = self._functional.QuantState(absmax, shape=shape, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
        return self._functional.dequantize_4bit(codes.view(-1, 1), state)


@functools.cache
def get_backend(device_type: str, wanted: str | None = None) -> Backend:
    """Picks what computes NF4 on a kind of device, and says which: bitsandbytes where it runs, else plain torch.

    Args:
        device_type: cpu or cuda.
        wanted: one of ``NAMES``; None: the first that runs.

    Raises:
        ConfigError: bitsandbytes is wanted and does not run.
    """
    if wanted not in (None, *NAMES):
        raise ConfigError(f"peft.quantize_backend {wanted!r} is none of {', '.join(NAMES)}")
    problem = "plain torch is asked for"
    if wanted != "torch":
        try:
            backend = BitsAndBytesBackend()
            probe = torch.linspace(-1, 1, 2 * BLOCK, device=device_type)
            if torch.equal(backend.quantise(probe)[0], TorchBackend().quantise(probe)[0]):
                get_logger(__name__).info("NF4 on %s: bitsandbytes", device_type)
                return backend
            problem = "its codes of a probe are wrong"
        except Exception as error:  # a missing package, a library that does not load, a device without kernels
            problem = f"{type(error).__name__}: {error}"
        if wanted is not None:
            raise ConfigError(
                f"peft.quantize_backend is bitsandbytes, which does not run on {device_type} ({problem}): install it (pip "
                "install 'megatron_vlm[qlora]'), or leave the setting out to quantise with plain torch"
            )
    get_logger(__name__).info("NF4 on %s: plain torch (%s)", device_type, problem)
    return TorchBackend()


def quantise(weight: Tensor, backend: Backend, *, double: bool) -> Nf4Tensor:
    """Quantises a whole tensor of 16- or 32-bit floats, in its own dtype, on its own device.

    Args:
        weight: cast to the dtype of the run before: that is what transformers quantises.
        backend: of its device.
        double: quantise the scales of blocks as well.
    """
    flat = weight.detach().reshape(-1)
    codes, absmax = zip(*(backend.quantise(chunk) for chunk in flat.split(_CHUNK)))
    tensor = Nf4Tensor(shape=tuple(weight.shape), codes=torch.cat(codes), absmax=torch.cat(absmax))
    if not double:
        return tensor
    offset = tensor.absmax.mean()
    codes_8bit, scales = backend.quantise_8bit(tensor.absmax - offset)
    return Nf4Tensor(shape=tensor.shape, codes=tensor.codes, absmax=codes_8bit, scales=scales, offset=offset.reshape(1))


def dequantise(tensor: Nf4Tensor, backend: Backend, dtype: torch.dtype) -> Tensor:
    """The whole tensor."""
    absmax = tensor.absmax
    if tensor.scales is not None and tensor.offset is not None:
        group = torch.arange(tensor.num_blocks, device=absmax.device) // GROUP
        absmax = absmax_of(absmax, tensor.scales[group], tensor.offset)
    flat = backend.dequantise(tensor.blocks(), absmax, dtype).view(-1)
    return flat[: torch.Size(tensor.shape).numel()].view(tensor.shape)


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
