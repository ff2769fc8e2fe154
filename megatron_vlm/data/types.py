"""What a family gives the data system, and what the index keeps of a sample.

RawSample (data/sample.py)   one record as a user wrote it: turns of text, images as encoded bytes
  --Processor.encode--> EncodedSample --row_from_samples--> Row (data/row.py)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from megatron_vlm.data.sample import Turn
from megatron_vlm.errors import Reason

if TYPE_CHECKING:  # loads torch, which a look at raw records does without
    from PIL import Image
    from torch import Tensor

    from megatron_vlm.data.formats.records import VideoSettings
    from megatron_vlm.data.row import EncodedSample
    from megatron_vlm.data.text.chat import FastTokenizer

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


class Processor(Protocol):
    """What a family gives the data system: a frozen dataclass of plain values, which travels to worker processes.

    Samples are counted once for any ``seq_length`` unless ``truncate`` is set: with ``dataclasses.replace``. ``mean`` and
    ``std`` undo the normalisation of pixels: a model without images has neither.
    """

    image_ids: tuple[int, ...]
    filler_token_id: int
    stop_ids: tuple[int, ...]
    tokenizer: FastTokenizer
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seq_length: int
    truncate: bool

    @property
    def video(self) -> VideoSettings:
        """How frames of a video are taken for the model."""

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

    def encode_prompt(self, turns: Sequence[Turn], images: Sequence[Image.Image]) -> EncodedSample:
        """Encodes a question, up to where the assistant answers; without labels.

        Raises:
            DataError: what is wrong with it, by name.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer's ids, the token that ended it left out."""
