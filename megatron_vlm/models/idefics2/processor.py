"""Idefics2's processor: prompts, image tokens and pixels equal to those of transformers' ``Idefics2Processor``.

    turns --chat template, <image> -> fake, image x n, fake--> pieces --data.chat--> ids, labels
    images --upright RGB, resize (longest edge, then shortest edge)--> uint8 --table--> float32 [3, H, W]

Text is used as it is written: LLaVA's line break after ``<image>`` stays, so ask the exported model in the same way.

The prompt is ``User: TEXT<end_of_utterance>\\nAssistant: TEXT<end_of_utterance>\\n`` after BOS, without the space where
a turn begins with an image. A model whose vocabulary has no ``<end_of_utterance>`` (the base variant) uses its EOS
token in that place: transformers' processor would add the token with an id beyond the model's embedding.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_vlm.data.chat import FastTokenizer, Piece, Tokens, encode_pieces, fit, plain_tokenizer
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images import normalise_table, upright_rgb
from megatron_vlm.data.shards import num_placeholders
from megatron_vlm.data.types import IGNORE_INDEX, EncodedSample, TokenCount, Turn
from megatron_vlm.errors import ConfigError, DataError

IMAGE = "<image>"
FAKE = "<fake_token_around_image>"
END = "<end_of_utterance>"
_GLUED = re.compile(rf"{re.escape(FAKE)}(?=[^\s<])")
_PROBE = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
]


@dataclass(frozen=True, kw_only=True)
class Idefics2Processor:
    """Encodes samples for Idefics2. Plain values only: it travels to worker processes.

    Attributes:
        tokenizer: of the model, special tokens added.
        image_token_id, fake_token_id, filler_token_id: ids of ``<image>``, ``<fake_token_around_image>`` and filler.
        bos_token_id: never supervised; None: the tokenizer adds none.
        end: text that ends a turn.
        image_seq_len: ``<image>`` tokens per image, the perceiver's latents.
        longest_edge, shortest_edge: of a resized image, in pixels.
        resample: PIL's code of the resampling filter.
        rescale, mean, std: normalisation, per channel.
        patch_size: of the vision tower, for the cost of an image.
        seq_length, truncate, answer_loss_only, max_image_num: see DataConfig.
    """

    tokenizer: FastTokenizer
    image_token_id: int
    fake_token_id: int
    filler_token_id: int
    bos_token_id: int | None
    end: str
    image_seq_len: int
    longest_edge: int
    shortest_edge: int
    resample: int
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch_size: int
    seq_length: int
    truncate: bool
    answer_loss_only: bool
    max_image_num: int | None

    @classmethod
    def from_pretrained(cls, hf_dir: str | Path, config: DataConfig) -> "Idefics2Processor":
        """Reads tokenizer, processor and model configuration of an HF folder.

        Raises:
            ConfigError: a file is missing, or a setting that is not built or cannot work.
        """
        hf_dir = Path(hf_dir)
        model = _read_json(hf_dir / "config.json")
        settings, images = _processor_settings(hf_dir)
        splitting = (
            images.get("do_image_splitting", False) if config.image_splitting is None else config.image_splitting
        )
        if splitting:
            raise ConfigError(
                f"{hf_dir} asks for do_image_splitting, which is not built yet: set data.image_splitting=false to "
                "train on whole images, and do_image_splitting to false in the processor files the trained model is used with"
            )
        for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if not images.get(name, True):
                raise ConfigError(f"{hf_dir}: {name} false is not built for Idefics2")
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
            image_seq_len=image_seq_len,
            longest_edge=longest,
            shortest_edge=shortest,
            resample=int(images.get("resample", Image.Resampling.BILINEAR)),
            rescale=float(images.get("rescale_factor", 1 / 255)),
            mean=tuple(images.get("image_mean") or (0.5, 0.5, 0.5)),
            std=tuple(images.get("image_std") or (0.5, 0.5, 0.5)),
            patch_size=patch_size,
            seq_length=config.seq_length,
            truncate=config.on_too_long == "truncate",
            answer_loss_only=config.answer_loss_only,
            max_image_num=config.max_image_num,
        )

    @cached_property
    def fingerprint(self) -> str:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "tokenizer"}
        return hashlib.sha256(json.dumps([1, self.tokenizer.text, values], sort_keys=True).encode()).hexdigest()

    @cached_property
    def _table(self) -> np.ndarray:
        return normalise_table(self.rescale, self.mean, self.std)

    def count(self, turns: Sequence[Turn], image_sizes: Sequence[tuple[int, int]]) -> TokenCount:
        """See data.types.Processor."""
        return self._count(turns, image_sizes)[0]

    def encode(self, key: str, turns: Sequence[Turn], images: Sequence[Image.Image], seed: int = 0) -> EncodedSample:
        """See data.types.Processor. There is no random augmentation, so ``seed`` has no effect."""
        images = [upright_rgb(image) for image in images]
        count, tokens = self._count(turns, [image.size for image in images])
        if tokens is None or count.reason:
            limits = f"{count.tokens} tokens, seq_length {self.seq_length}, {len(images)} images"
            raise DataError(f"cannot be trained on: {count.reason} ({limits})", key=key)
        ids = torch.from_numpy(tokens.ids)
        labels = ids.where(torch.from_numpy(tokens.supervised), torch.tensor(IGNORE_INDEX))
        positions = (ids == self.image_token_id).nonzero()[:, 0]
        pixels = tuple(self.pixels(image) for image in images[: len(positions) // self.image_seq_len])
        return EncodedSample(key=key, input_ids=ids, labels=labels, pixels=pixels, image_positions=positions)

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """Resizes and normalises an RGB image: float32 [3, H, W], bit for bit as ``Idefics2ImageProcessorPil``."""
        values = np.asarray(image.resize(self.resized(*image.size), resample=self.resample))
        pixels = np.empty((3, *values.shape[:2]), dtype=np.float32)
        for channel, row in enumerate(self._table):
            np.take(row, values[:, :, channel], out=pixels[channel], mode="clip")  # clip: without a buffer for ``out``
        return torch.from_numpy(pixels)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Returns width and height after resizing, rounded as transformers' ``get_resize_output_image_size`` does."""
        aspect_ratio = width / height
        if width >= height and width > self.longest_edge:
            width, height = self.longest_edge, int(self.longest_edge / aspect_ratio)
        elif height > width and height > self.longest_edge:
            width, height = int(self.longest_edge * aspect_ratio), self.longest_edge
        return max(width, self.shortest_edge), max(height, self.shortest_edge)

    def _count(self, turns: Sequence[Turn], image_sizes: Sequence[tuple[int, int]]) -> tuple[TokenCount, Tokens | None]:
        reason = ""
        if num_placeholders(turns) != len(image_sizes):
            reason = "placeholders"
        elif self.max_image_num is not None and len(image_sizes) > self.max_image_num:
            reason = "max_image_num"
        elif any(FAKE in turn.text or self.end in turn.text for turn in turns):
            reason = "control_tokens"
        if reason:
            return TokenCount(tokens=0, supervised=0, image_tokens=0, patches=0, reason=reason), None
        keep = (self.image_token_id, self.fake_token_id)
        tokens = fit(self._tokenise, turns, self.seq_length, truncate=self.truncate, keep=keep)
        if tokens is None:
            length = len(self._tokenise(turns).ids)
            return TokenCount(tokens=length, supervised=0, image_tokens=0, patches=0, reason="too_long"), None
        image_tokens = int((tokens.ids == self.image_token_id).sum())
        kept = image_sizes[: image_tokens // self.image_seq_len]
        count = TokenCount(
            tokens=len(tokens.ids),
            supervised=tokens.num_supervised,
            image_tokens=image_tokens,
            patches=sum((w // self.patch_size) * (h // self.patch_size) for w, h in (self.resized(*s) for s in kept)),
            reason="" if tokens.num_supervised else "nothing_supervised",
            truncated=tokens.truncated,
        )
        return count, tokens

    def _tokenise(self, turns: Sequence[Turn]) -> Tokens:
        pieces = []
        for turn in turns:
            answer = turn.role == "assistant"
            pieces.append(Piece(text=f"{turn.role.capitalize()}:"))
            space = "" if turn.text.startswith(IMAGE) else " "
            # The space is the model's to write: generation goes on from "Assistant:".
            pieces.append(Piece(text=f"{space}{self._expand(turn.text)}{self.end}", answer=answer))
            pieces.append(Piece(text="\n"))
        never = [self.image_token_id, self.fake_token_id, *([] if self.bos_token_id is None else [self.bos_token_id])]
        return encode_pieces(self.tokenizer, pieces, len(turns), answer_only=self.answer_loss_only, never=never)

    def _expand(self, text: str) -> str:
        """Replaces placeholders: adjacent images share a fake token, a word right after one gets transformers' space."""
        text = text.replace(IMAGE, f"{FAKE}{IMAGE * self.image_seq_len}{FAKE}").replace(FAKE + FAKE, FAKE)
        return _GLUED.sub(f"{FAKE} ", text)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid json: {error}") from error


def _processor_settings(hf_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns settings of the processor and of its image processor, which older folders keep in a file of its own."""
    processor, images = hf_dir / "processor_config.json", hf_dir / "preprocessor_config.json"
    settings = _read_json(processor) if processor.is_file() or not images.is_file() else {}
    return settings, settings.get("image_processor") or (_read_json(images) if images.is_file() else {})


def _chat_template(hf_dir: Path) -> str | None:
    """Returns the processor's chat template, from wherever transformers has kept it over the years."""
    if (hf_dir / "chat_template.jinja").is_file():
        return (hf_dir / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        if (hf_dir / name).is_file() and "chat_template" in (settings := _read_json(hf_dir / name)):
            return settings["chat_template"]
    return None


def _tokens_of(hf_dir: Path, model: dict[str, Any]) -> dict[str, Any]:
    """Loads the tokenizer as transformers does and keeps its backend, which needs no transformers."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the tokenizer of {hf_dir}: {error}") from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer of {hf_dir} has no tokenizer.json, which exact loss masks need: save it as a fast one"
        )
    missing = {FAKE, IMAGE} - set(tokenizer.get_vocab())
    if missing:
        raise ConfigError(f"the tokenizer of {hf_dir} lacks {', '.join(sorted(missing))}: is it Idefics2's?")
    vocab_size = model.get("text_config", {}).get("vocab_size", 32000)
    end = END if tokenizer.get_vocab().get(END, vocab_size) < vocab_size else tokenizer.eos_token
    if end is None:
        raise ConfigError(f"the tokenizer of {hf_dir} has neither {END} nor an EOS token")
    tokenizer.add_special_tokens({"additional_special_tokens": [FAKE, IMAGE, *([END] if end == END else [])]})
    template = _chat_template(hf_dir)
    if template is not None:
        text = tokenizer.apply_chat_template(_PROBE, chat_template=template, tokenize=False)
        wanted = f"User:{IMAGE}a{END}\nAssistant: b{END}\n"
        if text != wanted:
            raise ConfigError(f"{hf_dir} has a chat template that is not Idefics2's: it makes {text!r}, not {wanted!r}")
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    if model.get("image_token_id", 32001) != image_token_id:
        raise ConfigError(
            f"{hf_dir}: config.json has image_token_id {model.get('image_token_id')}, the tokenizer {image_token_id}"
        )
    fillers = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return {
        "tokenizer": plain_tokenizer(tokenizer.backend_tokenizer),
        "image_token_id": image_token_id,
        "fake_token_id": tokenizer.convert_tokens_to_ids(FAKE),
        "filler_token_id": next(i for i in fillers if i is not None and i < vocab_size),
        "bos_token_id": tokenizer.bos_token_id,
        "end": end,
    }
