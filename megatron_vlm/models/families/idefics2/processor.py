"""Idefics2's processor: prompts, image tokens and pixels equal to those of transformers' ``Idefics2Processor``.

    turns --chat template, <image> -> fake, image x n, fake--> pieces --data.chat--> ids, labels
    images --upright RGB (--four quarters and the whole), resize (longest edge, then shortest edge)--> uint8 --table-->
        float32 [3, H, W]

Text is used as it is written: LLaVA's line break after ``<image>`` stays, so ask the exported model in the same way.

The prompt is ``User: TEXT<end_of_utterance>\\nAssistant: TEXT<end_of_utterance>\\n`` after BOS, without the space where
a turn begins with an image. A model whose vocabulary has no ``<end_of_utterance>`` (the base variant) uses its EOS
token in that place: transformers' processor would add the token with an id beyond the model's embedding.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images.pictures import quarters, size_within
from megatron_vlm.data.sample import Turn
from megatron_vlm.data.text.chat import Piece, Tokens, encode_pieces
from megatron_vlm.errors import ConfigError, Reason
from megatron_vlm.log import get_logger
from megatron_vlm.models.processing.conversation import ConversationProcessor, Size, data_fields
from megatron_vlm.models.processing.pixels import HALF, NormalisedPixels, pixel_fields
from megatron_vlm.models.processing.processor_files import (
    check_image_settings,
    generation_stops,
    load_tokenizer,
    processor_settings,
    read_json,
    token_ids,
    tokenizer_fields,
)
from megatron_vlm.models.processing.utterances import END, FAKE, IMAGE, written_first

LOGGER = get_logger(__name__)
_GLUED = re.compile(rf"{re.escape(FAKE)}(?=[^\s<])")


@dataclass(frozen=True, kw_only=True)
class Idefics2Processor(NormalisedPixels, ConversationProcessor):
    """Encodes samples for Idefics2. Plain values only: it travels to worker processes.

    Attributes:
        fake_token_id: id of ``<fake_token_around_image>``.
        bos_token_id: never supervised; None: the tokenizer adds none.
        end: text that ends a turn.
        image_seq_len: ``<image>`` tokens per view of an image, the perceiver's latents.
        splitting: the model sees each image as five views: its four quarters, and the whole.
        longest_edge, shortest_edge: of a resized image, in pixels.
        patch_size: of the vision tower, for the cost of an image.
    """

    fake_token_id: int
    bos_token_id: int | None
    end: str
    image_seq_len: int
    splitting: bool
    longest_edge: int
    shortest_edge: int
    patch_size: int

    @classmethod
    def from_pretrained(cls, hf_dir: str | Path, config: DataConfig) -> "Idefics2Processor":
        """Reads tokenizer, processor and model configuration of an HF folder.

        Raises:
            ConfigError: a file is missing, or a setting that is not built or cannot work.
        """
        hf_dir = Path(hf_dir)
        model = read_json(hf_dir / "config.json")
        config.check_template("idefics2")
        check_image_settings(config, "Idefics2", "max_image_num", "image_size", "shortest_edge", "image_splitting")
        settings, images = processor_settings(hf_dir)
        written = images.get("do_image_splitting", False)
        splitting = written if config.image_splitting is None else config.image_splitting
        if splitting != written:
            LOGGER.info(
                "data.image_splitting is %s: set do_image_splitting to it in the processor files that the trained model "
                "is used with",
                str(splitting).lower(),
            )
        pixels = pixel_fields(hf_dir, images, "Idefics2", Image.Resampling.BILINEAR, HALF)
        size = images.get("size") or {}
        longest = config.image_size or size.get("longest_edge", 980)
        shortest = config.shortest_edge or min(size.get("shortest_edge", 378), longest)
        if shortest > longest:
            raise ConfigError(f"shortest_edge {shortest} is longer than image_size {longest}: lower data.shortest_edge")
        image_seq_len = settings.get("image_seq_len", 64)
        latents = model.get("perceiver_config", {}).get("resampler_n_latents", 64)
        if image_seq_len != latents:
            raise ConfigError(f"{hf_dir}: image_seq_len {image_seq_len} differs from the perceiver's {latents} latents")
        patch_size = model.get("vision_config", {}).get("patch_size", 32)
        if shortest < patch_size:
            raise ConfigError(
                f"shortest_edge {shortest} is below one patch of {patch_size} pixels: raise data.shortest_edge"
            )
        return cls(
            **_tokens_of(hf_dir, model),
            **pixels,
            **data_fields(config),
            image_seq_len=image_seq_len,
            splitting=splitting,
            longest_edge=longest,
            shortest_edge=shortest,
            patch_size=patch_size,
        )

    @property
    def never_cut(self) -> tuple[int, ...]:
        return (self.image_token_id, self.fake_token_id)

    def unusable(self, turns: Sequence[Turn], sizes: Sequence[Size]) -> Reason:
        quartered = self.splitting and any(min(size) < 2 for size in sizes)
        return Reason.IMAGE_TOO_SMALL if quartered else Reason.NONE

    def patches(self, plan: Size) -> int:
        sizes = [self.resized(right - left, low - top) for left, top, right, low in self.boxes(*plan)]
        return sum((width // self.patch_size) * (height // self.patch_size) for width, height in sizes)

    def views(self, image: Image.Image, plan: Size, draw: Any) -> list[torch.Tensor]:
        return [self.pixels(image.crop(box)) for box in self.boxes(*plan)]

    def boxes(self, width: int, height: int) -> list[tuple[int, int, int, int]]:
        """Returns the boxes (left, top, right, bottom) of an image that the model sees, in order."""
        return [*(quarters(width, height) if self.splitting else []), (0, 0, width, height)]

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """Resizes and normalises an RGB image: float32 [3, H, W], bit for bit as ``Idefics2ImageProcessorPil``."""
        return self.normalised(image.resize(self.resized(*image.size), resample=self.resample))

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Returns width and height after resizing."""
        return size_within(width, height, self.longest_edge, self.shortest_edge)

    def tokenise(self, turns: Sequence[Turn], plans: Sequence[Size], prompt: bool = False) -> Tokens:
        pieces = []
        for turn in turns:
            answer = turn.role == "assistant"
            pieces.append(Piece(text=f"{turn.role.capitalize()}:"))
            space = "" if turn.text.startswith(IMAGE) else " "
            # The space is the model's to write: generation goes on from "Assistant:".
            text = f"{space}{self._expand(turn.text)}{self.end}"
            pieces.append(Piece(text=text, answer=answer, loss=turn.loss))
            pieces.append(Piece(text="\n"))
        if prompt:
            pieces.append(Piece(text="Assistant:"))
        never = [*self.never_cut, *([] if self.bos_token_id is None else [self.bos_token_id])]
        return encode_pieces(self.tokenizer, pieces, len(turns), answer_only=self.answer_loss_only, never=never)

    def _expand(self, text: str) -> str:
        """Replaces placeholders: adjacent views share a fake token, a word right after one gets transformers' space."""
        view = f"{FAKE}{IMAGE * self.image_seq_len}{FAKE}"
        text = text.replace(IMAGE, view * (5 if self.splitting else 1)).replace(FAKE + FAKE, FAKE)
        return _GLUED.sub(f"{FAKE} ", text)


def _tokens_of(hf_dir: Path, model: dict[str, Any]) -> dict[str, Any]:
    """Loads the tokenizer as transformers does and keeps its backend, which needs no transformers."""
    tokenizer = load_tokenizer(hf_dir)
    vocabulary = tokenizer.get_vocab()
    ids = token_ids(hf_dir, vocabulary.get, (FAKE, IMAGE), "Idefics2")
    vocab_size = model.get("text_config", {}).get("vocab_size", 32000)
    end = END if vocabulary.get(END, vocab_size) < vocab_size else tokenizer.eos_token
    if end is None:
        raise ConfigError(f"the tokenizer of {hf_dir} has neither {END} nor an EOS token")
    tokenizer.add_special_tokens({"additional_special_tokens": [FAKE, IMAGE, *([END] if end == END else [])]})
    written_first(hf_dir, tokenizer, "Idefics2", "")
    return {
        **tokenizer_fields(hf_dir, tokenizer, ids[IMAGE], model.get("image_token_id", 32001), vocab_size, (FAKE, end)),
        "fake_token_id": ids[FAKE],
        "bos_token_id": tokenizer.bos_token_id,
        "end": end,
        "stop_ids": generation_stops(hf_dir, tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id),
    }


def stop_ids(hf_dir: Path) -> tuple[int, ...]:
    """Ids that end an answer of a model with the tokenizer files of ``hf_dir``."""
    return _tokens_of(hf_dir, read_json(hf_dir / "config.json"))["stop_ids"]
