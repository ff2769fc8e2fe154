"""The order of samples: (seed, epoch, position) -> sample id, a pure function without any list in memory.

    ids      0 ................................ N-1      neighbours lie side by side in a shard
    slices   [S ids][S ids] ... [short one]              shuffled as wholes by a keyed permutation, the short one last
    windows  [W slices][W slices] ... [rest]             positions of a window are shuffled over all ids of its slices

So a window reads W runs of S neighbouring samples, in random order, and the shuffle radius is W x S. Both shuffles are
Feistel networks with cycle walking: a bijection on 0 .. n-1 for every n, key and epoch, evaluated where it is needed.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8  # 4 leave correlations between positions and ids that a statistical test sees; 8 do not


def permute(index: NDArray[np.int64], n: int, key: str, tweak: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Maps each of ``index`` (int64, in 0 .. n-1) through a keyed permutation of 0 .. n-1.

    ``tweak`` (int64, one for each of ``index``) picks a permutation of its own for each value.
    """
    if n <= 1:
        return np.zeros_like(index)
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    digest = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8")
    salt = np.zeros(len(index), dtype=np.uint64) if tweak is None else _mix(tweak.astype(np.uint64) + keys[0])

    def cipher(x: NDArray[np.uint64], salt: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> shift, x & mask
        for k in keys:
            left, right = right, left ^ (_mix((right + k) ^ salt) & mask)
        return (left << shift) | right

    out = cipher(index.astype(np.uint64), salt)
    outside = np.flatnonzero(out >= n)
    while outside.size:  # cycle walking: the cipher's domain is below 4 n, so few rounds do
        out[outside] = cipher(out[outside], salt[outside])
        outside = outside[out[outside] >= n]
    return out.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of ``num_samples`` samples.

    Attributes:
        num_samples: N.
        seed: of the run; a text where several orders share one.
        slice_size: S, neighbouring ids that stay together in a window.
        window_slices: W, slices that are shuffled among each other.
    """

    num_samples: int
    seed: int | str
    slice_size: int = 128
    window_slices: int = 64

    def __call__(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the sample ids (int64) at ``positions`` (int64, 0 .. N-1) of an epoch; a bijection per epoch."""
        radius = self.slice_size * self.window_slices
        windows, inner = np.divmod(positions, radius)
        last, rest = divmod(self.num_samples, radius)
        whole = windows < last
        key = f"{self.seed}/{epoch}/window"
        inner[whole] = permute(inner[whole], radius, key, windows[whole])
        inner[~whole] = permute(inner[~whole], rest, key, windows[~whole])
        ranks, offsets = np.divmod(inner, self.slice_size)
        return self._slice(epoch, ranks + windows * self.window_slices) * self.slice_size + offsets

    def _slice(self, epoch: int, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        whole, key = self.num_samples // self.slice_size, f"{self.seed}/{epoch}/slice"
        first, last = (int(ranks.min()), int(ranks.max())) if ranks.size else (0, 0)
        if last - first < len(ranks) // 2:  # neighbouring positions share slices: each is looked up once
            wanted = np.arange(first, last + 1, dtype=np.int64)
            return self._slice(epoch, wanted)[ranks - first]
        return np.where(ranks < whole, permute(np.minimum(ranks, whole - 1), whole, key), ranks)
