"""Gemma 3's processor: prompts, image tokens and pixels equal to those of transformers' ``Gemma3Processor``.

    turns --chat template, <image> -> \\n\\n<start_of_image><image_soft_token> x n<end_of_image>\\n\\n--> ids, labels
    images --resize to S x S, and with pan and scan crops of the longer edge--> uint8 --table--> float32 [3, S, S] each

    <bos><start_of_turn>user\\nSYSTEM\\n\\nTEXT<end_of_turn>\\n<start_of_turn>model\\nTEXT<end_of_turn>\\n

Texts are stripped, as the template does. Loss is taken on an answer and its ``<end_of_turn>``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.sample import IMAGE_PLACEHOLDER, Turn
from megatron_vlm.data.text.chat import Piece, Tokens, encode_pieces
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.families.gemma3.config import Gemma3ModelConfig
from megatron_vlm.models.hf_config import require
from megatron_vlm.models.processing.chat_template import chat_template, render
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

START, SOFT, END = "<start_of_image>", "<image_soft_token>", "<end_of_image>"
OPEN, CLOSE = "<start_of_turn>", "<end_of_turn>"
_PROBE = [
    {"role": "system", "content": [{"type": "text", "text": "s"}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " a "}]},
    {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
]
_LEAST, _MOST, _RATIO = 256, 4, 1.2
"""Pan and scan: least side of a crop, most crops, least ratio of edges. transformers' processor goes by these, and does none
unless it is asked to, whatever preprocessor_config.json says."""
Box = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Gemma3Processor(NormalisedPixels, ConversationProcessor):
    """Encodes samples for Gemma 3. Plain values only: it travels to worker processes.

    The plan of an image is the boxes of its crops (left, upper, right, lower); none: it is seen whole alone.

    Attributes:
        begin: text before the first turn; empty where the tokenizer itself puts BOS there.
        marks: ids around the tokens of an image.
        image_tokens: tokens of an image; ``image_patches``: of the tower; ``side``: pixels of a side.
        scan: long images are seen in crops too.
    """

    begin: str
    marks: tuple[int, ...]
    image_tokens: int
    image_patches: int
    side: int
    scan: bool

    @classmethod
    def from_pretrained(cls, hf_dir: str | Path, config: DataConfig) -> "Gemma3Processor":
        """Reads tokenizer, processor and model configuration of an HF folder.

        Raises:
            ConfigError: a file is missing, or a setting that is not built or cannot work.
        """
        hf_dir = Path(hf_dir)
        model = Gemma3ModelConfig.from_hf(read_json(hf_dir / "config.json"))
        config.check_template("gemma3")
        check_image_settings(config, "Gemma 3", "max_image_num", "image_splitting")
        settings, images = processor_settings(hf_dir)
        side = model.vision.image_size
        size = images.get("size") or {"height": 224, "width": 224}
        require(f"{hf_dir}: size", {**size}, {"height": side, "width": side}, "this model's tower")
        images["do_convert_rgb"] = True  # by transformers' processor, whatever the file says: published ones say null
        require(f"{hf_dir}: image_seq_length", settings.get("image_seq_length", 256), model.image_tokens, "this model")
        return cls(
            **_tokens_of(hf_dir, model),
            **pixel_fields(hf_dir, images, "Gemma 3", Image.Resampling.BILINEAR, HALF),
            **data_fields(config),
            image_tokens=model.image_tokens,
            image_patches=model.vision.side**2,
            side=side,
            scan=bool(config.image_splitting),
        )

    @property
    def never_cut(self) -> tuple[int, ...]:
        return (self.image_token_id, *self.marks)

    def plans(self, turns: Sequence[Turn], sizes: Sequence[Size], options: Mapping[str, Any]) -> list[list[Box]]:
        return [self.crops(*size) for size in sizes]

    def crops(self, width: int, height: int) -> list[Box]:
        """Boxes of the crops of an image, along its longer edge."""
        longer, shorter = max(width, height), min(width, height)
        if not self.scan or longer / shorter < _RATIO:
            return []
        count = min(_MOST, max(2, min(longer // _LEAST, floor(longer / shorter + 0.5))))
        step = ceil(longer / count)
        if min(step, shorter) < _LEAST:
            return []
        ends = [(step * i, min(step * (i + 1), longer)) for i in range(count)]
        return [(a, 0, b, height) if width >= height else (0, a, width, b) for a, b in ends]

    def patches(self, plan: Sequence[Box]) -> int:
        return (1 + len(plan)) * self.image_patches

    def views(self, image: Image.Image, plan: Sequence[Box], draw: Any) -> list[torch.Tensor]:
        """Pixels of the image and its crops, bit for bit as ``Gemma3ImageProcessorPil``."""
        cut = [image, *(image.crop(box) for box in plan)]
        return [self.normalised(view.resize((self.side, self.side), resample=self.resample)) for view in cut]

    def tokenise(self, turns: Sequence[Turn], plans: Sequence[Sequence[Box]], prompt: bool = False) -> Tokens:
        system = f"{turns[0].text}\n\n" if turns and turns[0].role == "system" else ""
        pieces, boxes = [Piece(text=self.begin, loss=False)], iter(plans)
        for turn in turns[1:] if system else turns:
            answer = turn.role == "assistant"
            pieces.append(Piece(text=f"{OPEN}{'model' if answer else turn.role}\n{system}"))
            system = ""
            for number, text in enumerate(turn.text.split(IMAGE_PLACEHOLDER)):
                if number:
                    pieces.append(Piece(text=self.image_text(len(next(boxes))), answer=answer, loss=False))
                pieces.append(Piece(text=text.strip(), answer=answer, loss=turn.loss))
            pieces += [Piece(text=CLOSE, answer=answer, loss=turn.loss), Piece(text="\n")]
        if prompt:
            pieces.append(Piece(text=f"{OPEN}model\n"))
        return encode_pieces(
            self.tokenizer, pieces, len(turns), answer_only=self.answer_loss_only, never=self.never_cut
        )

    def image_text(self, crops: int) -> str:
        """What stands in the prompt for an image."""
        whole = f"\n\n{START}{SOFT * self.image_tokens}{END}\n\n"
        if not crops:
            return whole
        some = " ".join([whole] * crops)
        return f"Here is the original image {whole} and here are some crops to help you see better {some}"


def _tokens_of(hf_dir: Path, model: Gemma3ModelConfig) -> dict[str, Any]:
    tokenizer, marks = load_tokenizer(hf_dir), (START, SOFT, END, OPEN, CLOSE)
    ids = token_ids(hf_dir, tokenizer.get_vocab().get, marks, "Gemma 3")
    bos, template = tokenizer.bos_token or "", chat_template(hf_dir)
    if template is not None:
        text = render(template, _PROBE, hf_dir, **tokenizer.special_tokens_map)
        wanted = f"{bos}{OPEN}user\ns\n\n{START}a{CLOSE}\n{OPEN}model\nb{CLOSE}\n"
        if text != wanted:
            raise ConfigError(f"{hf_dir} has a chat template that is not Gemma 3's: it makes {text!r}, not {wanted!r}")
    added = bool(bos) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    steering = (*marks, *([bos] if bos else []))
    return {
        **tokenizer_fields(hf_dir, tokenizer, ids[SOFT], model.image_token_id, model.text.vocab_size, steering),
        "begin": "" if added else bos,
        "marks": (ids[START], ids[END]),
        "stop_ids": generation_stops(hf_dir, ids[CLOSE], tokenizer.eos_token_id),
    }


def stop_ids(hf_dir: Path) -> tuple[int, ...]:
    """Ids that end an answer of a model with the tokenizer files of ``hf_dir``."""
    return _tokens_of(hf_dir, Gemma3ModelConfig.from_hf(read_json(hf_dir / "config.json")))["stop_ids"]
