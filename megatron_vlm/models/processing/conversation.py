"""What the families' processors share: a conversation is counted and encoded in one way, whatever its prompt and images.

    turns, image sizes --plans--> one plan an image --tokenise, fit--> ids, labels --> TokenCount | EncodedSample
                                          +--views--> pixels

A family gives the prompt (``tokenise``) and what the model sees of an image (``plans``, ``patches``, ``views``).
"""

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.formats.records import OWN_VIDEO, VideoSettings
from megatron_vlm.data.images.pictures import StoredImages, upright_rgb
from megatron_vlm.data.images.video import announce
from megatron_vlm.data.row import IGNORE_INDEX, EncodedSample
from megatron_vlm.data.sample import Turn
from megatron_vlm.data.shards.writer import num_placeholders
from megatron_vlm.data.text.chat import FastTokenizer, Tokens, fit
from megatron_vlm.data.text.literal import RESERVED, check_text, found, hidden
from megatron_vlm.data.types import NO_OPTIONS, TokenCount
from megatron_vlm.errors import DataError, Reason

Size = tuple[int, int]


def data_fields(config: DataConfig) -> dict[str, Any]:
    """Fields of every processor that the data section alone decides."""
    return {
        "seq_length": config.seq_length,
        "truncate": config.on_too_long == "truncate",
        "answer_loss_only": config.answer_loss_only,
        "special_tokens_in_text": config.special_tokens_in_text,
        "max_image_num": config.max_image_num,
    }


@dataclass(frozen=True, kw_only=True)
class ConversationProcessor:
    """Encodes conversations. Plain values only: it travels to worker processes.

    Attributes:
        tokenizer: of the model.
        image_token_id: holds the place of image features; -1: the model has no images.
        filler_token_id: of filler.
        stop_ids: tokens that end an answer.
        seq_length, truncate, answer_loss_only, special_tokens_in_text, max_image_num: see DataConfig.
    """

    tokenizer: FastTokenizer
    image_token_id: int = -1
    filler_token_id: int
    stop_ids: tuple[int, ...]
    seq_length: int
    truncate: bool
    answer_loss_only: bool
    special_tokens_in_text: str
    max_image_num: int | None

    # ---- what a family gives ----

    @property
    def never_cut(self) -> tuple[int, ...]:
        """Ids that the too-long policy does not cut off: of an image's tokens."""
        return (self.image_token_id,)

    @property
    def image_ids(self) -> tuple[int, ...]:
        """Ids that hold the place of image features."""
        return (self.image_token_id,)

    @property
    def video(self) -> VideoSettings:
        """How frames of a video are taken for the model."""
        return OWN_VIDEO

    def written(self, turn: Turn) -> Turn:
        """A turn as the prompt has it; here each frame of a video is an image, announced on a line of its own."""
        return announce(turn)

    def unusable(self, turns: Sequence[Turn], sizes: Sequence[Size]) -> Reason:
        """Why a sample is left out; ``Reason.NONE``: it is not."""
        return Reason.NONE

    def plans(self, turns: Sequence[Turn], sizes: Sequence[Size], options: Mapping[str, Any]) -> Sequence[Any]:
        """How each image is seen, from its (width, height): what the next three are given."""
        return sizes

    def tokenise(self, turns: Sequence[Turn], plans: Sequence[Any], prompt: bool = False) -> Tokens:
        """Writes and tokenises the prompt; ``prompt`` ends it where the assistant answers."""
        raise NotImplementedError

    def patches(self, plan: Any) -> int:
        """Patches that the tower sees of an image."""
        raise NotImplementedError

    def views(self, image: Image.Image, plan: Any, draw: random.Random | None) -> Sequence[Tensor]:
        """Pixels of an upright RGB image, float32 [3, H, W] each; ``draw`` where it is augmented."""
        raise NotImplementedError

    def pixels_of(self, images: Sequence[Image.Image], plans: Sequence[Any], draw: Any) -> tuple[Tensor, ...]:
        """Pixels of all images of a sample."""
        return tuple(view for image, plan in zip(images, plans) for view in self.views(image, plan, draw))

    def tiles(self, pixels: Tensor) -> tuple[int, int]:
        """See data.types.Processor."""
        return 0, 0

    # ---- what they share ----

    @cached_property
    def fingerprint(self) -> str:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "tokenizer"}
        text = json.dumps([5, self.tokenizer.text, values], sort_keys=True, default=dataclasses.asdict)
        return hashlib.sha256(text.encode()).hexdigest()

    def count(
        self, turns: Sequence[Turn], image_sizes: Sequence[Size], options: Mapping[str, Any] = NO_OPTIONS
    ) -> TokenCount:
        """See data.types.Processor."""
        return self._count(turns, image_sizes, options)[0]

    def encode(
        self,
        key: str,
        turns: Sequence[Turn],
        images: Sequence[Image.Image],
        seed: int = 0,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> EncodedSample:
        """See data.types.Processor. ``seed`` keys the augmentation that the option ``data_augment`` asks for."""
        images = images if isinstance(images, StoredImages) else [upright_rgb(image) for image in images]
        sizes = images.sizes if isinstance(images, StoredImages) else [image.size for image in images]
        count, tokens, plans = self._count(turns, sizes, options)
        if tokens is None or count.reason:
            limits = f"{count.tokens} tokens, seq_length {self.seq_length}, {len(images)} images"
            raise DataError(f"cannot be trained on: {count.reason} ({limits})", reason=count.reason, key=key)
        ids = torch.from_numpy(tokens.ids)
        labels = ids.where(torch.from_numpy(tokens.supervised), torch.tensor(IGNORE_INDEX))
        return self._sample(
            key, ids, labels, images, plans, random.Random(seed) if options.get("data_augment") else None
        )

    def encode_prompt(self, turns: Sequence[Turn], images: Sequence[Image.Image]) -> EncodedSample:
        """Encodes a conversation up to where the assistant answers; every label is -100.

        Raises:
            DataError: as many images as placeholders are needed; a text that no tokenizer takes.
        """
        for turn in turns:
            check_text(turn.text, f"the text of the {turn.role} turn")
        if num_placeholders(turns) != len(images):
            message = f"{num_placeholders(turns)} <image> placeholders for {len(images)} images"
            raise DataError(message, reason=Reason.PLACEHOLDERS)
        images = [upright_rgb(image) for image in images]
        turns = self._as_text([self.written(turn) for turn in turns])
        plans = self.plans(turns, [image.size for image in images], NO_OPTIONS)
        ids = torch.from_numpy(self.tokenise(turns, plans, prompt=True).ids)
        return self._sample("prompt", ids, torch.full_like(ids, IGNORE_INDEX), images, plans, None)

    def special_tokens(self, turns: Sequence[Turn]) -> list[str]:
        """Returns the special tokens that texts of a conversation write out."""
        specials = self.tokenizer.specials
        return sorted({token for turn in turns for token in found(turn.text, specials)})

    def _as_text(self, turns: Sequence[Turn]) -> list[Turn]:
        return [dataclasses.replace(turn, text=hidden(turn.text, self.tokenizer.specials)) for turn in turns]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of an answer's ids, without special tokens but for marks of grounding (``literal.CONTENT_TOKENS``)."""
        return self.tokenizer.decode([i for i in ids if i not in self._silent]).strip()

    @cached_property
    def _silent(self) -> frozenset[int | None]:
        return frozenset((*map(self.tokenizer.token_id, self.tokenizer.specials), *self.image_ids, *self.stop_ids))

    def _sample(
        self,
        key: str,
        ids: Tensor,
        labels: Tensor,
        images: Sequence[Image.Image],
        plans: Sequence[Any],
        draw: random.Random | None,
    ) -> EncodedSample:
        positions = torch.isin(ids, torch.tensor(self.image_ids)).nonzero()[:, 0]
        pixels = self.pixels_of(images, plans, draw)
        return EncodedSample(key=key, input_ids=ids, labels=labels, pixels=pixels, image_positions=positions)

    def _count(
        self, turns: Sequence[Turn], sizes: Sequence[Size], options: Mapping[str, Any]
    ) -> tuple[TokenCount, Tokens | None, Sequence[Any]]:
        """Counts, tokens, and plans of the images that the too-long policy leaves."""
        reason, turns = Reason.NONE, [self.written(turn) for turn in turns]
        if num_placeholders(turns) != len(sizes):
            reason = Reason.PLACEHOLDERS
        elif self.max_image_num is not None and len(sizes) > self.max_image_num:
            reason = Reason.MAX_IMAGE_NUM
        steering = self.special_tokens(turns)
        if (steering and self.special_tokens_in_text == "refuse") or any(RESERVED.search(t.text) for t in turns):
            reason = reason or Reason.CONTROL_TOKENS
        reason = reason or self.unusable(turns, sizes)
        if reason:
            return TokenCount(tokens=0, supervised=0, image_tokens=0, patches=0, reason=reason), None, ()
        turns = self._as_text(turns) if steering else turns
        plans = self.plans(turns, sizes, options)
        tokens = fit(
            lambda some: self.tokenise(some, plans), turns, self.seq_length, truncate=self.truncate, keep=self.never_cut
        )
        if tokens is None:
            length = len(self.tokenise(turns, plans).ids)
            return TokenCount(tokens=length, supervised=0, image_tokens=0, patches=0, reason=Reason.TOO_LONG), None, ()
        plans = plans[: num_placeholders(turns[: tokens.num_turns])]
        count = TokenCount(
            tokens=len(tokens.ids),
            supervised=tokens.num_supervised,
            image_tokens=int(np.isin(tokens.ids, self.image_ids).sum()),
            patches=sum(self.patches(plan) for plan in plans),
            reason=Reason.NONE if tokens.num_supervised else Reason.NOTHING_SUPERVISED,
            truncated=tokens.truncated,
        )
        return count, tokens, plans
