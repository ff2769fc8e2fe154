"""What the processors of Qwen2.5-VL and Qwen3-VL share: prompts, image tokens, pixels and positions equal to transformers' own.

    turns --chat template, <image> -> <|vision_start|><|image_pad|> x n<|vision_end|>--> ids, labels: answer, <|im_end|>
    images --resize to whole blocks, between min and max pixels--> uint8 --table--> float32 [3, H, W]
    ids, grids --M-RoPE--> positions [3, L]

Where a template has a system line, a conversation begins with it unless its first turn is a system turn. Videos are not built.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images.pictures import size_of_blocks
from megatron_vlm.data.row import EncodedSample
from megatron_vlm.data.sample import Turn
from megatron_vlm.data.text.chat import Piece, Tokens, encode_pieces
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.hf_config import require
from megatron_vlm.models.parts.qwen_vit import QwenVLConfig
from megatron_vlm.models.processing.chat_template import chat_template, render
from megatron_vlm.models.processing.conversation import ConversationProcessor, Size, data_fields
from megatron_vlm.models.processing.mrope import mrope_positions
from megatron_vlm.models.processing.pixels import CLIP, NormalisedPixels, pixel_fields
from megatron_vlm.models.processing.processor_files import (
    check_image_settings,
    generation_stops,
    load_tokenizer,
    processor_settings,
    read_json,
    token_ids,
    tokenizer_fields,
)

IMAGE = "<image>"
START, PAD, END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
OPEN, CLOSE = "<|im_start|>", "<|im_end|>"
ASSISTANT = f"{OPEN}assistant\n"
_PIXELS = (56 * 56, 28 * 28 * 1280)  # of transformers' image processor, where the files do not say; so is _SIDES
_SIDES = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
_PROBE = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
]


@dataclass(frozen=True, kw_only=True)
class QwenKind:
    """A family of these.

    Attributes:
        name: for errors.
        family: in the registry.
        system: text of the system line of a conversation without one; empty: it has none.
        config: reads a config.json.
    """

    name: str
    family: str
    system: str
    config: Callable[[dict[str, Any]], QwenVLConfig]


@dataclass(frozen=True, kw_only=True)
class QwenVLProcessor(NormalisedPixels, ConversationProcessor):
    """Encodes samples. Plain values only: it travels to worker processes.

    The plan of an image is its (columns, rows) of blocks.

    Attributes:
        system: see QwenKind.
        mark_ids: ids of ``<|vision_start|>`` and ``<|vision_end|>``.
        unit: pixels of a side of a block, which becomes one token.
        block_patches: patches of a block.
        min_pixels, max_pixels: of a resized image.
    """

    system: str
    mark_ids: tuple[int, int]
    unit: int
    block_patches: int
    min_pixels: int
    max_pixels: int

    @property
    def never_cut(self) -> tuple[int, ...]:
        return (self.image_token_id, *self.mark_ids)

    def plans(self, turns: Sequence[Turn], sizes: Sequence[Size], options: Mapping[str, Any]) -> list[Size]:
        return [size_of_blocks(*size, self.unit, self.min_pixels, self.max_pixels) for size in sizes]

    def patches(self, plan: Size) -> int:
        return plan[0] * plan[1] * self.block_patches

    def views(self, image: Image.Image, plan: Size, draw: Any) -> list[Tensor]:
        size = (plan[0] * self.unit, plan[1] * self.unit)
        return [self.normalised(image.resize(size, resample=self.resample))]

    def tokenise(self, turns: Sequence[Turn], plans: Sequence[Size], prompt: bool = False) -> Tokens:
        """The whole conversation is tokenised as one text, as transformers does, with one ``<|image_pad|>`` an image."""
        given = not self.system or (turns and turns[0].role == "system")
        lines = list(turns) if given else [Turn(role="system", text=self.system), *turns]
        pieces: list[Piece] = []
        for turn in lines:
            text = turn.text.replace(IMAGE, f"{START}{PAD}{END}")
            pieces += [
                Piece(text=f"{OPEN}{turn.role}\n"),
                Piece(text=f"{text}{CLOSE}", answer=turn.role == "assistant", loss=turn.loss),
                Piece(text="\n"),
            ]
        if prompt:
            pieces.append(Piece(text=ASSISTANT))
        tokens = encode_pieces(
            self.tokenizer, pieces, len(turns), answer_only=self.answer_loss_only, never=self.never_cut
        )
        images = tokens.ids == self.image_token_id
        repeats = np.ones(len(images), dtype=np.int64)
        repeats[images] = [columns * rows for columns, rows in plans[: int(images.sum())]]
        return dataclasses.replace(
            tokens,
            ids=tokens.ids.repeat(repeats),
            supervised=tokens.supervised.repeat(repeats),
            answer_start=int(repeats[: tokens.answer_start].sum()),
        )

    def _sample(self, key: str, ids: Tensor, labels: Tensor, images: Any, plans: Any, draw: Any) -> EncodedSample:
        sample = super()._sample(key, ids, labels, images, plans, draw)
        grids = [(1, rows, columns) for columns, rows in plans]
        return dataclasses.replace(sample, position_ids=mrope_positions(ids == self.image_token_id, grids))


def processor_fields(hf_dir: Path, config: DataConfig, kind: QwenKind) -> dict[str, Any]:
    """Fields of ``QwenVLProcessor`` from tokenizer, processor and model configuration of an HF folder.

    Raises:
        ConfigError: a file is missing, or a setting that is not built or cannot work.
    """
    model = kind.config(read_json(hf_dir / "config.json"))
    config.check_template(kind.family)
    check_image_settings(config, kind.name, "max_image_num", "min_pixels", "max_pixels")
    _, images = processor_settings(hf_dir)
    vision, size = model.vision, images.get("size") or {}
    for name, wanted in zip(_SIDES, (vision.patch_size, vision.block, vision.temporal_patch_size)):
        require(f"{hf_dir}: {name}", images.get(name, _SIDES[name]), wanted, "this model's tower")
    least, most = (
        getattr(config, f"{name}_pixels") or images.get(f"{name}_pixels") or size.get(f"{edge}_edge") or default
        for name, edge, default in zip(("min", "max"), ("shortest", "longest"), _PIXELS)
    )
    if not vision.unit**2 <= most or least > most:
        raise ConfigError(
            f"an image has {least} to {most} pixels, of which one block of {vision.unit}x{vision.unit} is the least: set "
            "data.min_pixels and data.max_pixels, in order"
        )
    return dict(
        **tokens_of(hf_dir, kind),
        **pixel_fields(hf_dir, images, kind.name, Image.Resampling.BICUBIC, CLIP),
        **data_fields(config),
        system=kind.system,
        unit=vision.unit,
        block_patches=vision.block**2,
        min_pixels=least,
        max_pixels=most,
    )


def tokens_of(hf_dir: Path, kind: QwenKind) -> dict[str, Any]:
    """Those of tokens alone.

    Raises:
        ConfigError: a token that is missing, or a chat template that is not ``kind``'s.
    """
    model = kind.config(read_json(hf_dir / "config.json"))
    tokenizer = load_tokenizer(hf_dir)
    marks = (START, PAD, END, OPEN, CLOSE)
    ids = token_ids(hf_dir, tokenizer.get_vocab().get, marks, kind.name)
    template = chat_template(hf_dir)
    if template is not None:
        text = render(template, _PROBE, hf_dir)
        system = f"{OPEN}system\n{kind.system}{CLOSE}\n" if kind.system else ""
        wanted = f"{system}{OPEN}user\n{START}{PAD}{END}a{CLOSE}\n{ASSISTANT}b{CLOSE}\n"
        if text != wanted:
            raise ConfigError(
                f"{hf_dir} has a chat template that is not {kind.name}'s: it makes {text!r}, not {wanted!r}"
            )
    return {
        **tokenizer_fields(hf_dir, tokenizer, ids[PAD], model.image_token_id, model.text.vocab_size, marks),
        "mark_ids": (ids[START], ids[END]),
        "stop_ids": generation_stops(hf_dir, ids[CLOSE]),
    }
