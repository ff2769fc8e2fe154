"""Rotary position embedding: the angles of every token of a packed row, with the scalings of Llama-shaped models.

    position ids, segment lengths --inverse frequencies (per segment for dynamic NTK)--> angles [T, 1, 1, D]

Formulas: RoFormer (Su et al. 2021); scalings as transformers 5.23, ``modeling_rope_utils.py``; three positions a token, M-RoPE:
Qwen2-VL (arXiv 2409.12191).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError

_KEYS = {
    "linear": (),
    "dynamic": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}
"""rope_type -> what it has beside factor and original_max_position_embeddings."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Config):
    """How RoPE reaches beyond the positions it was trained on; names and meanings of transformers' ``rope_parameters``.

    Attributes:
        rope_type: ``linear``; ``dynamic`` (NTK: the base grows with a sample's length beyond the model's positions); ``yarn``
            (long wavelengths are stretched, short ones stay, and attention is sharpened: arXiv 2309.00071); ``llama3`` (long
            wavelengths are stretched).
        factor: of the stretching; None, in settings alone: as large as ``data.seq_length`` needs.
        original_max_position_embeddings: positions it was trained on; None, in settings alone: those of the model.
        low_freq_factor, high_freq_factor: of ``llama3``: trained positions over the wavelengths between which it blends; 1 and 4.
        beta_fast, beta_slow, truncate: of ``yarn``: rotations within the original positions between which it blends (32 and 1),
            at whole dimensions (true).
        attention_factor, mscale, mscale_all_dim: of ``yarn``: what cosines and sines are times, or what that is made from.
    """

    rope_type: Literal["linear", "dynamic", "yarn", "llama3"]
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def __post_init__(self) -> None:
        for name, low in (("factor", 1), ("original_max_position_embeddings", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"the {name} of a RoPE scaling is at least {low}, got {value}")
        for name in sorted(set(sum(_KEYS.values(), ())) - set(_KEYS[self.rope_type])):
            if getattr(self, name) is not None:
                raise ConfigError(f"{name} has no effect on RoPE scaled by {self.rope_type}: leave it out")

    @classmethod
    def read(cls, rope: Mapping[str, Any]) -> "RopeScaling | None":
        """Reads transformers' ``rope_parameters``, or the ``rope_scaling`` of older files (``type`` for ``rope_type``).

        Raises:
            ConfigError: a kind that is not built, or no factor.
        """
        kind: Any = rope.get("rope_type") or rope.get("type") or "default"
        if kind == "default":
            return None
        if kind not in _KEYS:
            raise ConfigError(f"rope_type {kind!r} is not built: default, {', '.join(_KEYS)} are")
        if rope.get("factor") is None:
            raise ConfigError(f"rope_type {kind!r} needs a factor, found {sorted(rope)}")
        original = ("original_max_position_embeddings",) if _KEYS[kind] else ()
        names = ("factor", *original, *_KEYS[kind])
        return cls.from_dict({"rope_type": kind, **{name: rope.get(name) for name in names}}, "rope_parameters")

    @property
    def concentration(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor

        def scale(by: float) -> float:
            assert self.factor is not None
            return 0.1 * by * math.log(self.factor) + 1.0

        return scale(self.mscale) / scale(self.mscale_all_dim) if self.mscale and self.mscale_all_dim else scale(1.0)


class RotaryAngles:
    """Angles of a head dimension ``dim``; halves, not pairs, are rotated against each other.

    Args:
        dim: D, of a head.
        base: ``rope_theta``.
        max_positions: trained positions, beyond which ``dynamic`` acts.
        scaling: None: none.
        device: of the angles.
        axes: which of a token's several positions turns each pair of dimensions, D / 2 numbers; empty: a token has one.
    """

    def __init__(
        self,
        dim: int,
        base: float,
        max_positions: int,
        scaling: RopeScaling | None,
        device: torch.device,
        axes: Sequence[int] = (),
    ):
        self.axes = torch.tensor(axes, device=device)
        self.dim, self.base, self.max_positions, self.scaling = dim, base, max_positions, scaling
        self.exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        self.inv_freq = _scaled(1.0 / (base**self.exponents), base, max_positions, scaling)

    def __call__(
        self, position_ids: Tensor, cu_q: Tensor, cu_k: Tensor, max_k: int, segments: Tensor | None = None
    ) -> Tensor:
        """Angles, fp32 [T, 1, 1, D].

        Args:
            position_ids: int64 [T], or [3, T] where there are ``axes``.
            cu_q: int32 [N + 1], segments of these tokens.
            cu_k: int32 [N + 1], the same segments with the tokens before these, by whose lengths ``dynamic`` scales.
            max_k: the longest of them.
            segments: int64 [T], the segment of each token, where these are some of a row's; None: as ``cu_q`` says.
        """
        positions = position_ids.float()[:, None] if position_ids.dim() == 1 else position_ids.float()[self.axes].T
        if self.scaling is not None and self.scaling.rope_type == "dynamic" and max_k > self.max_positions:
            stretched = self._dynamic(cu_k)
            if segments is None:
                by_token = stretched.repeat_interleave(cu_q.diff(), 0, output_size=position_ids.shape[-1])
            else:
                by_token = stretched.index_select(0, segments)
            freqs = positions * by_token
        else:
            freqs = positions * self.inv_freq
        return torch.cat((freqs, freqs), -1)[:, None, None]

    def _dynamic(self, cu_k: Tensor) -> Tensor:
        """[N, D / 2]: inverse frequencies in each segment, by its length."""
        assert self.scaling is not None and self.scaling.factor is not None
        lengths = cu_k.diff().clamp(min=self.max_positions).double()
        stretch = self.scaling.factor * lengths / self.max_positions - (self.scaling.factor - 1)
        bases = (self.base * stretch ** (self.dim / (self.dim - 2))).float()
        return 1.0 / (bases[:, None] ** self.exponents)


def _scaled(inv_freq: Tensor, base: float, max_positions: int, scaling: RopeScaling | None) -> Tensor:
    if scaling is None or scaling.rope_type == "dynamic":
        return inv_freq
    factor, positions = scaling.factor, scaling.original_max_position_embeddings or max_positions
    assert factor is not None
    if scaling.rope_type == "linear":
        return inv_freq / factor
    if scaling.rope_type == "yarn":
        low, high = _yarn_range(2 * len(inv_freq), base, positions, scaling)
        ramp = torch.arange(len(inv_freq), dtype=torch.float32, device=inv_freq.device)
        stretched = ((ramp - low) / (high - low)).clamp(0, 1)
        return inv_freq / factor * stretched + inv_freq * (1 - stretched)
    # Llama 3.1: short wavelengths stay, long ones are stretched, those between are blended.
    low, high = scaling.low_freq_factor or 1.0, scaling.high_freq_factor or 4.0
    wavelength = 2 * math.pi / inv_freq
    stretched = torch.where(wavelength > positions / low, inv_freq / factor, inv_freq)
    smooth = (positions / wavelength - low) / (high - low)
    blended = (1 - smooth) * stretched / factor + smooth * stretched
    between = (wavelength >= positions / high) & (wavelength <= positions / low)
    return torch.where(between, blended, stretched)


def _yarn_range(dim: int, base: float, positions: int, scaling: RopeScaling) -> tuple[float, float]:
    """Between which pairs of dimensions YaRN blends: those that turn ``beta_fast`` and ``beta_slow`` times in ``positions``."""

    def pair(rotations: float) -> float:
        return dim * math.log(positions / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(scaling.beta_fast or 32.0), pair(scaling.beta_slow or 1.0)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high if high != low else high + 0.001
