"""Rotary position embedding: the angles of every token of a packed row, with the scalings of Llama-shaped models.

    position ids, segment lengths --inverse frequencies (per segment for dynamic NTK)--> angles [T, 1, 1, D]

Formulas: RoFormer (Su et al. 2021); scalings as transformers 5.23, ``modeling_rope_utils.py``.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Config):
    """How RoPE reaches beyond the positions it was trained on.

    Attributes:
        kind: ``linear``; ``dynamic`` (NTK: the base grows with a sample's length beyond the model's positions);
            ``llama3`` (long wavelengths are stretched).
        factor: of the stretching.
        low_freq_factor, high_freq_factor, original_max_position_embeddings: of ``llama3``.
    """

    kind: Literal["linear", "dynamic", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ConfigError(f"a RoPE scaling factor is at least 1, got {self.factor}")


class RotaryAngles:
    """Angles of a head dimension ``dim``; halves, not pairs, are rotated against each other.

    Args:
        dim: D, of a head.
        base: ``rope_theta``.
        max_positions: trained positions, beyond which ``dynamic`` acts.
        scaling: None: none.
        device: of the angles.
    """

    def __init__(self, dim: int, base: float, max_positions: int, scaling: RopeScaling | None, device: torch.device):
        self.dim, self.base, self.max_positions, self.scaling = dim, base, max_positions, scaling
        self.exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        self.inv_freq = _scaled(1.0 / (base**self.exponents), scaling)

    def __call__(
        self, position_ids: Tensor, cu_q: Tensor, cu_k: Tensor, max_k: int, segments: Tensor | None = None
    ) -> Tensor:
        """Angles, fp32 [T, 1, 1, D].

        Args:
            position_ids: int64 [T].
            cu_q: int32 [N + 1], segments of these tokens.
            cu_k: int32 [N + 1], the same segments with the tokens before these, by whose lengths ``dynamic`` scales.
            max_k: the longest of them.
            segments: int64 [T], the segment of each token, where these are some of a row's; None: as ``cu_q`` says.
        """
        positions = position_ids.float()[:, None]
        if self.scaling is not None and self.scaling.kind == "dynamic" and max_k > self.max_positions:
            stretched = self._dynamic(cu_k)
            if segments is None:
                by_token = stretched.repeat_interleave(cu_q.diff(), 0, output_size=len(position_ids))
            else:
                by_token = stretched.index_select(0, segments)
            freqs = positions * by_token
        else:
            freqs = positions * self.inv_freq
        return torch.cat((freqs, freqs), -1)[:, None, None]

    def _dynamic(self, cu_k: Tensor) -> Tensor:
        """[N, D / 2]: inverse frequencies in each segment, by its length."""
        assert self.scaling is not None
        lengths = cu_k.diff().clamp(min=self.max_positions).double()
        stretch = self.scaling.factor * lengths / self.max_positions - (self.scaling.factor - 1)
        bases = (self.base * stretch ** (self.dim / (self.dim - 2))).float()
        return 1.0 / (bases[:, None] ** self.exponents)


def _scaled(inv_freq: Tensor, scaling: RopeScaling | None) -> Tensor:
    if scaling is None or scaling.kind == "dynamic":
        return inv_freq
    if scaling.kind == "linear":
        return inv_freq / scaling.factor
    # Llama 3.1: short wavelengths stay, long ones are stretched, those between are blended.
    positions = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    stretched = torch.where(wavelength > positions / scaling.low_freq_factor, inv_freq / scaling.factor, inv_freq)
    smooth = (positions / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    between = (wavelength >= positions / scaling.high_freq_factor) & (wavelength <= positions / scaling.low_freq_factor)
    return torch.where(between, blended, stretched)
