"""InternLM-XComposer2's processor: the prompts and labels of its training code, square images or HD grids of tiles.

    turns --[146]user, [146]assistant ... [145]--> parts, each tokenised on its own --> ids, labels
    images --squashed to S x S, or ``hd_transform``--> uint8 --table--> float32 [3, H, W]

A conversation is BOS, every turn between ``[UNUSED_TOKEN_146]`` and ``[UNUSED_TOKEN_145]``, and EOS. Supervised are answers with
their end token, and after the last one the line break and EOS too, as in the original. Source: InternLM-XComposer2,
modeling_internlm_xcomposer2.py (``interleav_wrap``, ``mask_human_targets``) and finetune/ixc_utils.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images.pictures import normalise, normalise_table
from megatron_vlm.data.images.tiling import hd_size, hd_transform
from megatron_vlm.data.sample import Turn
from megatron_vlm.data.text.chat import Piece, Tokens, encode_separately
from megatron_vlm.data.text.sentencepiece import load_tokenizer
from megatron_vlm.errors import ConfigError
from megatron_vlm.files import read_json
from megatron_vlm.log import get_logger
from megatron_vlm.models.families.xcomposer2.config import XComposer2Config
from megatron_vlm.models.processing.conversation import ConversationProcessor, Size, data_fields
from megatron_vlm.models.processing.pixels import CLIP
from megatron_vlm.models.processing.processor_files import check_image_settings, generation_stops, token_ids

IMAGE = "<image>"
OPEN, CLOSE, BOS, EOS = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]", "<s>", "</s>"
_PLACES = ("[UNUSED_TOKEN_0]", "<unk>")  # names of the token that holds an image's place; its embedding is never seen
_TABLE = normalise_table(1 / 255, *CLIP)


@dataclass(frozen=True, kw_only=True)
class XComposer2Processor(ConversationProcessor):
    """Encodes samples for InternLM-XComposer2. Plain values only: it travels to worker processes.

    Attributes:
        model: gives the tokens of an image.
        hd_num: most tiles of an image in the 4khd variant; 0 in the others.
        open_id, close_id, bos_token_id, eos_token_id: ids of the prompt.
        mean, std: normalisation, per channel.
    """

    model: XComposer2Config
    hd_num: int
    open_id: int
    close_id: int
    bos_token_id: int
    eos_token_id: int
    mean: ClassVar[tuple[float, ...]] = CLIP[0]
    std: ClassVar[tuple[float, ...]] = CLIP[1]

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
        place = next((name for name in _PLACES if tokenizer.token_id(name) is not None), _PLACES[-1])
        found = token_ids(hf_dir, tokenizer.token_id, (OPEN, CLOSE, BOS, EOS, place), "InternLM-XComposer2")
        return cls(
            tokenizer=tokenizer.steered_by((OPEN, CLOSE, BOS, EOS, place)),
            model=model,
            hd_num=_hd_num(model, config),
            image_token_id=found[place],
            open_id=found[OPEN],
            close_id=found[CLOSE],
            bos_token_id=found[BOS],
            eos_token_id=found[EOS],
            filler_token_id=found[EOS],
            stop_ids=generation_stops(hf_dir, found[CLOSE], found[EOS]),
            **data_fields(config),
        )

    def plans(self, turns: Sequence[Turn], sizes: Sequence[Size], options: Mapping[str, Any]) -> list[Size]:
        return [self.grid(size) for size in sizes]

    def tiles(self, pixels: torch.Tensor) -> tuple[int, int]:
        side = self.model.vision.image_size
        return (side, pixels.shape[2] // side) if self.hd_num else (0, 0)

    def patches(self, plan: Size) -> int:
        return (plan[0] * plan[1] + 1 if self.hd_num else 1) * self.model.vision.side**2

    def views(self, image: Image.Image, plan: Size, draw: Any) -> list[torch.Tensor]:
        return [self.pixels(image)]

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """Prepares an RGB image: float32 [3, H, W]."""
        side = self.model.vision.image_size
        if self.hd_num:
            image = hd_transform(image, self.hd_num, side)
        else:
            image = image.resize((side, side), Image.Resampling.BICUBIC)
        return torch.from_numpy(normalise([image], _TABLE))

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of tiles of an image of (width, height)."""
        return hd_size(*size, self.hd_num, self.model.vision.image_size)[0] if self.hd_num else (1, 1)

    def tokenise(self, turns: Sequence[Turn], plans: Sequence[Size], prompt: bool = False) -> Tokens:
        """The end of the last answer, its line break and EOS are one piece, so that the answer starts where ``fit`` cuts."""
        remaining = iter(plans)
        pieces = [Piece(ids=(self.bos_token_id,))]
        for number, turn in enumerate(turns):
            answer, last = turn.role == "assistant", number == len(turns) - 1 and not prompt
            pieces += [Piece(ids=(self.open_id,)), Piece(text=f"{turn.role}\n")]
            ids: list[int] = []
            for part, text in enumerate(turn.text.strip().split(IMAGE)):
                if part:
                    ids += [self.image_token_id] * self.model.tokens(*next(remaining))
                ids += self.tokenizer.ids(text)
            end = [*self.tokenizer.ids("\n"), *([self.eos_token_id] if last else [])]
            whole = (*ids, self.close_id, *(end if answer and last else ()))
            pieces.append(Piece(ids=whole, answer=answer, loss=turn.loss))
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


def stop_ids(hf_dir: Path) -> tuple[int, ...]:
    """Ids that end an answer of a model with the tokenizer files of ``hf_dir``."""
    found = token_ids(hf_dir, load_tokenizer(hf_dir).token_id, (CLOSE, EOS), "InternLM-XComposer2")
    return generation_stops(hf_dir, *found.values())
