"""What crosses the borders of the data system: RawSample -> EncodedSample -> PackedRow -> VLMBatch.

    RawSample      one record as a user wrote it: turns of text, images as encoded bytes
    EncodedSample  the same as the model sees it: token ids with every image expanded, labels, normalised pixels
    PackedRow      whole samples laid end to end: one microbatch, on the host
    VLMBatch       a PackedRow on the device, as the model's ``forward`` takes it

Shapes: T tokens of a row, L tokens of a sample, N segments of a row, C x H x W pixels of one image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from megatron_vlm.data.sample import RawSample as RawSample
from megatron_vlm.data.sample import Turn as Turn
from megatron_vlm.errors import Reason

IGNORE_INDEX = -100
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class TokenCount:
    """What the index keeps of a sample for one processor fingerprint (no pixels are needed to know it).

    Attributes:
        tokens: tokens of the encoded sample, images expanded, after the too-long policy.
        supervised: labels that are not -100 (aligned with ``input_ids``; the first token is never predicted).
        image_tokens: tokens that hold image features.
        patches: patches the vision tower sees (its cost).
        reason: why the sample is excluded; ``Reason.NONE``: it is not.
        truncated: the too-long policy shortened it.
    """

    tokens: int
    supervised: int
    image_tokens: int
    patches: int
    reason: Reason = Reason.NONE
    truncated: bool = False


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """One sample as the model sees it.

    Attributes:
        key: name of the sample.
        input_ids: int64 [L], image placeholders expanded to their final number of tokens.
        labels: int64 [L], aligned with ``input_ids`` as in HF (not shifted); -100 where no loss is taken.
        pixels: one float32 [C, H, W] per image, normalised, each of its own size; row-major use order.
        image_positions: int64 [sum of image tokens], indices into ``input_ids`` that image features overwrite, in order.
    """

    key: str
    input_ids: Tensor
    labels: Tensor
    pixels: tuple[Tensor, ...] = ()
    image_positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


@dataclass(frozen=True, kw_only=True)
class PackedRow:
    """The unit of work: one microbatch, on the host.

    Attributes:
        input_ids: int64 [T].
        position_ids: int64 [T], restarting at 0 in each segment.
        labels: int64 [T], SHIFTED: ``labels[t]`` is the token to predict at position t, -100 where no loss is taken
            (always at the last position of a segment and over filler).
        cu_seqlens: int32 [N + 1], starts of the segments and T at the end.
        pixels: one float32 [C, H, W] per image of the row.
        image_positions: int64, indices into ``input_ids`` that image features overwrite, in order of ``pixels``.
        keys: one per real sample.
        num_filler: tokens of the filler segment at the end (0: none).
        holes: samples of the plan that could not be read.
        truncated: samples that the too-long policy shortened.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    pixels: tuple[Tensor, ...] = ()
    image_positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    keys: tuple[str, ...] = ()
    num_filler: int = 0
    holes: int = 0
    truncated: int = 0

    @property
    def num_tokens(self) -> int:
        """Real tokens: filler does not count."""
        return len(self.input_ids) - self.num_filler

    @property
    def num_supervised(self) -> int:
        """Tokens that a loss is taken on."""
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass(frozen=True, kw_only=True)
class VLMBatch:
    """A row on the device. Later pipeline stages get the same fields with ``pixels`` empty.

    Attributes:
        input_ids, position_ids, labels: int64 [1, T] (labels shifted as in PackedRow).
        cu_seqlens: int32 [N + 1] on the device; ``cu_seqlens_host`` the same numbers, so that no kernel launch waits.
        max_seqlen: longest segment.
        loss_positions: int64 [num_supervised], positions whose label is not -100.
        pixels: one float32 [C, H, W] per image (first stage only).
        image_positions: int64, positions that image features overwrite.
        num_images: images of the row, known on every stage.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    cu_seqlens_host: tuple[int, ...]
    max_seqlen: int
    loss_positions: Tensor
    pixels: tuple[Tensor, ...]
    image_positions: Tensor
    num_images: int

    @classmethod
    def from_row(cls, row: PackedRow, device: torch.device | str = "cpu", pixels: bool = True) -> "VLMBatch":
        """Moves a row to ``device``; ``pixels=False`` leaves the images behind (stages without the tower)."""
        cu = tuple(row.cu_seqlens.tolist())
        return cls(
            input_ids=row.input_ids[None].to(device, non_blocking=True),
            position_ids=row.position_ids[None].to(device, non_blocking=True),
            labels=row.labels[None].to(device, non_blocking=True),
            cu_seqlens=row.cu_seqlens.to(device, non_blocking=True),
            cu_seqlens_host=cu,
            max_seqlen=max(b - a for a, b in pairwise(cu)),
            loss_positions=(row.labels != IGNORE_INDEX).nonzero()[:, 0].to(device, non_blocking=True),
            pixels=tuple(p.to(device, non_blocking=True) for p in row.pixels) if pixels else (),
            image_positions=row.image_positions.to(device, non_blocking=True),
            num_images=len(row.pixels),
        )


class Processor(Protocol):
    """What a family gives the data system: a frozen dataclass of plain values, which travels to worker processes.

    Samples are counted once for any ``seq_length`` unless ``truncate`` is set: with ``dataclasses.replace``.
    """

    image_token_id: int
    filler_token_id: int
    tokenizer: Any  # data.chat.FastTokenizer
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seq_length: int
    truncate: bool

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that changes token ids, labels or counts (tokenizer files, sizes, template, policy)."""

    def tiles(self, pixels: Tensor) -> tuple[int, int]:
        """How to show [C, H, W] that the tower gets in tiles: (side of one, tiles in a row); (0, 0): it gets them whole."""

    def special_tokens(self, turns: Sequence[Turn]) -> Sequence[str]:
        """Special tokens that the texts of a conversation write out."""

    def count(
        self, turns: Sequence[Turn], image_sizes: Sequence[tuple[int, int]], options: Mapping[str, Any] = NO_OPTIONS
    ) -> TokenCount:
        """Counts tokens from text, (width, height) of each image and ``RawSample.options`` alone.

        Equal to what ``encode`` makes.
        """

    def encode(
        self,
        key: str,
        turns: Sequence[Turn],
        images: Sequence[Image.Image],
        seed: int = 0,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> EncodedSample:
        """Encodes one sample. ``seed`` keys random augmentation: a pure function of (run seed, epoch, sample id).

        Raises:
            DataError: what is wrong with the sample, by name.
        """


def row_from_samples(
    samples: Sequence[EncodedSample],
    *,
    filler_token_id: int = 0,
    multiple_of: int = 1,
    fill_to: int = 0,
    holes: int = 0,
) -> PackedRow:
    """Lays whole samples end to end as one row.

    Args:
        samples: in order; may be empty when every sample of the row was a hole.
        filler_token_id: id of filler tokens.
        multiple_of: fill the row to a multiple of this (tp under sequence parallelism).
        fill_to: fill the row to exactly this many tokens (virtual pipeline stages); 0: no.
        holes: samples of the plan that could not be read; recorded.

    Returns:
        The row. A row without samples holds ``max(1, multiple_of, fill_to)`` filler tokens and no loss.

    Raises:
        ValueError: the samples are longer than ``fill_to``.
    """
    lengths = [len(s.input_ids) for s in samples]
    total = sum(lengths)
    target = max(fill_to, -(-total // multiple_of) * multiple_of, multiple_of)
    if fill_to and target != fill_to:
        raise ValueError(
            f"samples of {lengths} tokens (a multiple of {multiple_of} is needed) do not fit {fill_to} tokens"
        )
    filler = target - total
    ids, positions, labels, image_positions = [], [], [], []
    start = 0
    for sample, length in zip(samples, lengths):
        shifted = torch.full_like(sample.labels, IGNORE_INDEX)
        shifted[:-1] = sample.labels[1:]
        ids.append(sample.input_ids)
        positions.append(torch.arange(length))
        labels.append(shifted)
        image_positions.append(sample.image_positions + start)
        start += length
    if filler:
        lengths.append(filler)
        ids.append(torch.full((filler,), filler_token_id, dtype=torch.int64))
        positions.append(torch.arange(filler))
        labels.append(torch.full((filler,), IGNORE_INDEX, dtype=torch.int64))
    return PackedRow(
        input_ids=torch.cat(ids),
        position_ids=torch.cat(positions),
        labels=torch.cat(labels),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        pixels=tuple(p for s in samples for p in s.pixels),
        image_positions=torch.cat(image_positions) if image_positions else torch.empty(0, dtype=torch.int64),
        keys=tuple(s.key for s in samples),
        num_filler=filler,
        holes=holes,
    )


def plain(value: Any) -> Any:
    """Returns ints, strings, lists and dicts only (numpy scalars unwrapped), for JSON."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value.item() if hasattr(value, "item") else value
