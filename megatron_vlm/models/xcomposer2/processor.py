"""InternLM-XComposer2's processor: the prompts and labels of its training code, square images or HD grids of tiles.

    turns --[146]user, [146]assistant ... [145]--> parts, each tokenised on its own --> ids, labels
    images --squashed to S x S, or ``hd_transform``--> uint8 --table--> float32 [3, H, W]

A conversation is BOS, every turn between ``[UNUSED_TOKEN_146]`` and ``[UNUSED_TOKEN_145]``, and EOS. Supervised are answers with
their end token, and after the last one the line break and EOS too, as in the original. Source: InternLM-XComposer2,
modeling_internlm_xcomposer2.py (``interleav_wrap``, ``mask_human_targets``) and finetune/ixc_utils.py.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_vlm.data.chat import FastTokenizer, Piece, Tokens, encode_separately, fit
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images import normalise_table, upright_rgb
from megatron_vlm.data.sentencepiece import load_tokenizer
from megatron_vlm.data.shards import num_placeholders
from megatron_vlm.data.types import IGNORE_INDEX, NO_OPTIONS, EncodedSample, TokenCount, Turn
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.log import get_logger
from megatron_vlm.models.processor_files import check_image_settings, generation_stops, read_json
from megatron_vlm.models.xcomposer2.config import XComposer2Config

IMAGE = "<image>"
OPEN, CLOSE, BOS, EOS = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]", "<s>", "</s>"
_PLACES = ("[UNUSED_TOKEN_0]", "<unk>")  # names of the token that holds an image's place; its embedding is never seen
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WHITE = (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class XComposer2Processor:
    """Encodes samples for InternLM-XComposer2. Plain values only: it travels to worker processes.

    Attributes:
        tokenizer: of the model; it adds nothing around a text.
        model: gives the tokens of an image.
        hd_num: most tiles of an image in the 4khd variant; 0 in the others.
        image_token_id: holds the place of image features.
        open_id, close_id, bos_token_id, eos_token_id, filler_token_id: ids of the prompt.
        control_tokens: no turn may hold their text.
        stop_ids: tokens that end an answer.
        seq_length, truncate, answer_loss_only, max_image_num: see DataConfig.
    """

    tokenizer: FastTokenizer
    model: XComposer2Config
    hd_num: int
    image_token_id: int
    open_id: int
    close_id: int
    bos_token_id: int
    eos_token_id: int
    filler_token_id: int
    control_tokens: tuple[str, ...]
    stop_ids: tuple[int, ...]
    seq_length: int
    truncate: bool
    answer_loss_only: bool
    max_image_num: int | None

    @classmethod
    def from_pretrained(cls, hf_dir: str | Path, config: DataConfig) -> "XComposer2Processor":
        """Reads tokenizer and model configuration of an HF folder.

        Raises:
            ConfigError: a file is missing, or a setting that this variant cannot take.
        """
        hf_dir = Path(hf_dir)
        model = XComposer2Config.from_hf(read_json(hf_dir / "config.json"))
        config.check_template("xcomposer2")
        check_image_settings(config, "InternLM-XComposer2", "max_image_num", "image_size", "hd_num")
        tokenizer = load_tokenizer(hf_dir)
        ids = {name: tokenizer.token_id(name) for name in (OPEN, CLOSE, BOS, EOS, *_PLACES)}
        missing = [name for name in (OPEN, CLOSE, BOS, EOS, _PLACES[-1]) if ids[name] is None]
        if missing:
            raise ConfigError(f"the tokenizer of {hf_dir} lacks {', '.join(missing)}: is it InternLM-XComposer2's?")
        place = next(name for name in _PLACES if ids[name] is not None)
        found: dict[str, Any] = ids
        return cls(
            tokenizer=tokenizer,
            model=model,
            hd_num=_hd_num(model, config),
            image_token_id=found[place],
            open_id=found[OPEN],
            close_id=found[CLOSE],
            bos_token_id=found[BOS],
            eos_token_id=found[EOS],
            filler_token_id=found[EOS],
            control_tokens=(OPEN, CLOSE, BOS, EOS, place),
            stop_ids=generation_stops(hf_dir, found[CLOSE], found[EOS]),
            seq_length=config.seq_length,
            truncate=config.on_too_long == "truncate",
            answer_loss_only=config.answer_loss_only,
            max_image_num=config.max_image_num,
        )

    @cached_property
    def fingerprint(self) -> str:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("tokenizer", "model")}
        content = [1, self.tokenizer.text, self.model.to_dict(), values]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _table(self) -> np.ndarray:
        return normalise_table(1 / 255, CLIP_MEAN, CLIP_STD)

    def count(
        self, turns: Sequence[Turn], image_sizes: Sequence[tuple[int, int]], options: Mapping[str, Any] = NO_OPTIONS
    ) -> TokenCount:
        """See data.types.Processor. ``options`` speak of augmentation and of InternVL's tiles, which are none here."""
        return self._count(turns, image_sizes)[0]

    def encode(
        self,
        key: str,
        turns: Sequence[Turn],
        images: Sequence[Image.Image],
        seed: int = 0,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> EncodedSample:
        """See data.types.Processor. There is no augmentation, so ``seed`` has no effect."""
        images = [upright_rgb(image) for image in images]
        count, tokens = self._count(turns, [image.size for image in images])
        if tokens is None or count.reason:
            limits = f"{count.tokens} tokens, seq_length {self.seq_length}, {len(images)} images"
            raise DataError(f"cannot be trained on: {count.reason} ({limits})", key=key)
        ids = torch.from_numpy(tokens.ids)
        labels = ids.where(torch.from_numpy(tokens.supervised), torch.tensor(IGNORE_INDEX))
        return self._sample(key, ids, labels, images[: num_placeholders(turns[: tokens.num_turns])])

    def encode_prompt(self, turns: Sequence[Turn], images: Sequence[Image.Image]) -> EncodedSample:
        """Encodes a conversation up to where the assistant answers; every label is -100.

        Raises:
            DataError: as many images as placeholders are needed.
        """
        if num_placeholders(turns) != len(images):
            raise DataError(f"{num_placeholders(turns)} {IMAGE} placeholders for {len(images)} images")
        images = [upright_rgb(image) for image in images]
        ids = torch.from_numpy(self._tokenise(turns, [image.size for image in images], prompt=True).ids)
        return self._sample("prompt", ids, torch.full_like(ids, IGNORE_INDEX), images)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of an answer's ids, without the tokens that end it."""
        return self.tokenizer.decode([i for i in ids if i not in self.stop_ids]).strip()

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """Prepares an RGB image: float32 [3, H, W]."""
        side = self.model.vision.image_size
        if self.hd_num:
            image = hd_transform(image, self.hd_num, side)
        else:
            image = image.resize((side, side), Image.Resampling.BICUBIC)
        values = np.asarray(image)
        return torch.from_numpy(np.stack([row[values[:, :, channel]] for channel, row in enumerate(self._table)]))

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of tiles of an image of (width, height)."""
        return hd_size(*size, self.hd_num, self.model.vision.image_size)[0] if self.hd_num else (1, 1)

    def _sample(
        self, key: str, ids: torch.Tensor, labels: torch.Tensor, images: Sequence[Image.Image]
    ) -> EncodedSample:
        positions = (ids == self.image_token_id).nonzero()[:, 0]
        pixels = tuple(self.pixels(image) for image in images)
        return EncodedSample(key=key, input_ids=ids, labels=labels, pixels=pixels, image_positions=positions)

    def _count(self, turns: Sequence[Turn], sizes: Sequence[tuple[int, int]]) -> tuple[TokenCount, Tokens | None]:
        reason = ""
        if num_placeholders(turns) != len(sizes):
            reason = "placeholders"
        elif self.max_image_num is not None and len(sizes) > self.max_image_num:
            reason = "max_image_num"
        elif any(token in turn.text for turn in turns for token in self.control_tokens):
            reason = "control_tokens"
        if reason:
            return TokenCount(tokens=0, supervised=0, image_tokens=0, patches=0, reason=reason), None
        keep = [self.image_token_id]
        tokens = fit(
            lambda some: self._tokenise(some, sizes), turns, self.seq_length, truncate=self.truncate, keep=keep
        )
        if tokens is None:
            length = len(self._tokenise(turns, sizes).ids)
            return TokenCount(tokens=length, supervised=0, image_tokens=0, patches=0, reason="too_long"), None
        grids = [self.grid(size) for size in sizes[: num_placeholders(turns[: tokens.num_turns])]]
        views = sum(rows * columns + 1 if self.hd_num else 1 for rows, columns in grids)
        count = TokenCount(
            tokens=len(tokens.ids),
            supervised=tokens.num_supervised,
            image_tokens=int((tokens.ids == self.image_token_id).sum()),
            patches=views * self.model.vision.side**2,
            reason="" if tokens.num_supervised else "nothing_supervised",
            truncated=tokens.truncated,
        )
        return count, tokens

    def _tokenise(self, turns: Sequence[Turn], sizes: Sequence[tuple[int, int]], prompt: bool = False) -> Tokens:
        """The end of the last answer, its line break and EOS are one piece, so that the answer starts where ``fit`` cuts."""
        remaining = iter(sizes)
        pieces = [Piece(ids=(self.bos_token_id,))]
        for number, turn in enumerate(turns):
            answer, last = turn.role == "assistant", number == len(turns) - 1 and not prompt
            pieces += [Piece(ids=(self.open_id,)), Piece(text=f"{turn.role}\n")]
            ids: list[int] = []
            for part, text in enumerate(turn.text.strip().split(IMAGE)):
                if part:
                    ids += [self.image_token_id] * self.model.tokens(*self.grid(next(remaining)))
                ids += self.tokenizer.ids(text)
            end = [*self.tokenizer.ids("\n"), *([self.eos_token_id] if last else [])]
            whole = (*ids, self.close_id, *(end if answer and last else ()))
            pieces.append(Piece(ids=whole, answer=answer))
            if not (answer and last):
                pieces.append(Piece(ids=tuple(end)))
        if prompt:
            pieces += [Piece(ids=(self.open_id,)), Piece(text="assistant\n")]
        never = (self.bos_token_id, self.image_token_id)
        return encode_separately(self.tokenizer, pieces, len(turns), answer_only=self.answer_loss_only, never=never)


def _hd_num(model: XComposer2Config, config: DataConfig) -> int:
    if model.hd:
        if config.hd_num is None or config.hd_num < 1:
            raise ConfigError(
                "this is InternLM-XComposer2-4KHD: set data.hd_num (--hd-num) to the most tiles of an image, such as 16 (or 55)"
            )
        if config.image_size is not None:
            get_logger(__name__).info(
                "data.image_size (img_size) has no effect on the 4khd variant: images become up to %d tiles of %d pixels",
                config.hd_num,
                model.vision.image_size,
            )
        return config.hd_num
    if config.hd_num not in (None, -1):
        raise ConfigError(
            f"data.hd_num {config.hd_num} is for the 4khd variant: with {model.variant} leave it out, or -1"
        )
    side = model.vision.image_size
    if config.image_size not in (None, side):
        raise ConfigError(
            f"data.image_size (img_size) {config.image_size}: this checkpoint has positions for {side} pixels; leave it out"
        )
    return 0


def hd_size(width: int, height: int, hd_num: int, tile: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the grid (rows, columns) of an image and its size (width, height) on it, before it is padded to whole tiles.

    The longer side becomes as many tiles as ``hd_num`` tiles in all allow; smaller images grow. Source:
    InternLM-XComposer2-4KHD, ixc_utils.py, ``HD_transform``.
    """
    longer, ratio = max(width, height), max(width, height) / min(width, height)
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= hd_num:
        scale += 1
    longer, shorter = tile * scale, max(1, int(tile * scale / ratio))
    across = math.ceil(shorter / tile)
    if width < height:
        return (scale, across), (shorter, longer)
    return (across, scale), (longer, shorter)


def hd_transform(image: Image.Image, hd_num: int, tile: int) -> Image.Image:
    """Resizes an RGB image to its grid and centres it there on white."""
    if image.width < image.height:  # turned, as in the original: PIL rounds between its two passes
        turned = hd_transform(image.transpose(Image.Transpose.TRANSPOSE), hd_num, tile)
        return turned.transpose(Image.Transpose.TRANSPOSE)
    (rows, columns), size = hd_size(*image.size, hd_num, tile)
    canvas = Image.new("RGB", (columns * tile, rows * tile), WHITE)
    canvas.paste(image.resize(size, Image.Resampling.BILINEAR), (0, (rows * tile - size[1]) // 2))
    return canvas
