"""InternVL's processor: the prompts and labels of the original's training code, and its dynamic tiles.

    turns --template (``prompts.py``), one string a turn--> ids, labels: the answer and its <|im_end|>
    images --dynamic tiling (``data/images/tiling.py``)--> [3, n * side, side]: n tiles of an image, one below the other

Every conversation begins with a system line, the original's unless the first turn is a system turn, and BOS stands before it
where the tokenizer puts one before a text. ``<image>`` becomes ``<img>``, the tiles' ``<IMG_CONTEXT>`` tokens and ``</img>``.
Several images share the limit of tiles. An image announced as ``Frame-1: <image>`` is a frame of a video: one tile. Semantics:
InternVL, internvl_chat/internvl/train/dataset.py and internvl_chat_finetune.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.sample import Turn
from megatron_vlm.data.text.chat import Piece, Tokens, encode_separately
from megatron_vlm.errors import ConfigError
from megatron_vlm.log import get_logger
from megatron_vlm.models.families.internvl3.config import NAMINGS, InternVL3ModelConfig
from megatron_vlm.models.families.internvl3.prompts import CLOSE, DEFAULT, OPEN, PROMPTS
from megatron_vlm.models.processing.chat_template import chat_template
from megatron_vlm.models.processing.conversation import ConversationProcessor, Size, data_fields
from megatron_vlm.models.processing.pixels import IMAGENET, pixel_fields
from megatron_vlm.models.processing.processor_files import (
    check_image_settings,
    generation_stops,
    load_tokenizer,
    processor_settings,
    read_json,
    token_ids,
    tokenizer_fields,
)
from megatron_vlm.models.processing.tiles import TILE_SETTINGS, DynamicTiles, TilePlan, tile_fields

LOGGER = get_logger(__name__)
IMAGE = "<image>"
START, CONTEXT, STOP = "<img>", "<IMG_CONTEXT>", "</img>"
ASSISTANT = f"{OPEN}assistant\n"
_FRAME = re.compile(r"Frame-?\d+: $")


@dataclass(frozen=True, kw_only=True)
class InternVL3Processor(DynamicTiles, ConversationProcessor):
    """Encodes samples for InternVL. Plain values only: it travels to worker processes.

    Attributes:
        template: name of the prompt's form, of ``PROMPTS``.
        bos_token_id: begins a conversation; None: nothing does.
        start_token_id, stop_token_id: ids of ``<img>`` and ``</img>``.
        tile_tokens: ``<IMG_CONTEXT>`` tokens of one tile.
    """

    template: str
    bos_token_id: int | None
    start_token_id: int
    stop_token_id: int
    tile_tokens: int

    @classmethod
    def from_pretrained(cls, hf_dir: str | Path, config: DataConfig) -> "InternVL3Processor":
        """Reads tokenizer, processor and model configuration of an HF folder of either naming.

        Raises:
            ConfigError: a file is missing, or a setting that is not built or cannot work.
        """
        hf_dir = Path(hf_dir)
        content = read_json(hf_dir / "config.json")
        model = InternVL3ModelConfig.from_hf(content)
        check_image_settings(config, "InternVL3", "max_image_num", *TILE_SETTINGS)
        config.check_template("internvl3", *PROMPTS)
        own = own_template(hf_dir, content)
        if config.template not in (None, own):
            LOGGER.warning(
                "data.template is %s, the model in %s was trained on %s: whoever uses it after this must write prompts as %s",
                config.template, hf_dir, own, config.template,
            )  # fmt: skip
        read = _chat_settings if NAMINGS[content["model_type"]] == "chat" else _native_settings
        tiles = tile_fields(config, read(hf_dir, content, model), model.vision.patch_size, model.shuffle)
        tokens = _tokens_of(hf_dir, model)
        fields = dict[str, Any](template=config.template or own, tile_tokens=model.tile_tokens(tiles["side"]))
        return cls(**tokens, **tiles, **data_fields(config), **fields)

    @cached_property
    def _header(self) -> int:
        """Tokens of an answer's header."""
        return len(self.tokenizer.ids(ASSISTANT))

    @property
    def never_cut(self) -> tuple[int, ...]:
        return (self.image_token_id, self.start_token_id, self.stop_token_id)

    def plans(self, turns: Sequence[Turn], sizes: Sequence[Size], options: Mapping[str, Any]) -> list[TilePlan]:
        return [self.tile_plan(size, most) for size, most in zip(sizes, self.limits(turns, options))]

    def limits(self, turns: Sequence[Turn], options: Mapping[str, Any]) -> list[int]:
        """Most tiles of each image, in order: images share the limit, a frame of a video is one tile."""
        before = [text for turn in turns for text in turn.text.split(IMAGE)[:-1]]  # of each placeholder
        frames = [not self.dynamic or bool(_FRAME.search(text)) for text in before]
        most = int(options.get("max_dynamic_patch", self.max_tiles)) // max(1, frames.count(False))
        return [1 if frame else max(1, most) for frame in frames]

    def tokenise(self, turns: Sequence[Turn], plans: Sequence[TilePlan], prompt: bool = False) -> Tokens:
        """Each turn is tokenised on its own, header and end included; images within it stand for themselves."""
        numbers = (tiles for _, tiles in plans)
        form = PROMPTS[self.template]
        lines = list(turns) if turns and turns[0].role == "system" else [Turn(role="system", text=form.system), *turns]
        bos = () if self.bos_token_id is None else (self.bos_token_id,)
        pieces = [Piece(ids=bos)]
        for turn in lines:
            text = turn.text.strip() if form.strips else turn.text
            texts = f"{OPEN}{turn.role}\n{text}{form.end}".split(IMAGE)
            answer, header = turn.role == "assistant", self._header if turn.role == "assistant" else 0
            for number, text in enumerate(texts):
                if number:
                    context = (self.image_token_id,) * (self.tile_tokens * next(numbers))
                    image = (self.start_token_id, *context, self.stop_token_id)
                    pieces.append(Piece(ids=image, answer=answer, loss=turn.loss))
                ids = tuple(self.tokenizer.ids(text))
                ends = answer and number == len(texts) - 1
                end = len(ids) - (ends and form.end != CLOSE)  # without a line break at the very end
                start = header if number == 0 else 0
                pieces += [
                    Piece(ids=ids[:start]),
                    Piece(ids=ids[start:end], answer=answer, loss=turn.loss),
                    Piece(ids=ids[end:]),
                ]
        if prompt:
            pieces.append(Piece(text=ASSISTANT))
        never = (*self.never_cut, *bos)
        return encode_separately(self.tokenizer, pieces, len(turns), answer_only=self.answer_loss_only, never=never)


def _chat_settings(hf_dir: Path, content: dict[str, Any], model: InternVL3ModelConfig) -> dict[str, Any]:
    """What the original's config.json says of images."""
    if content.get("pad2square"):
        raise ConfigError(f"{hf_dir}: pad2square true is not built for InternVL3")
    return {
        "side": content.get("force_image_size") or model.vision.image_size,
        "min_tiles": content.get("min_dynamic_patch", 1),
        "max_tiles": content.get("max_dynamic_patch", 6),
        "dynamic": bool(content.get("dynamic_image_size")),
        "thumbnail": bool(content.get("use_thumbnail")),
        **pixel_fields(hf_dir, {}, "InternVL3", Image.Resampling.BICUBIC, IMAGENET),
    }


def _native_settings(hf_dir: Path, content: dict[str, Any], model: InternVL3ModelConfig) -> dict[str, Any]:
    """What transformers' processor files say; its ``InternVLProcessor`` always cuts tiles and adds the thumbnail."""
    settings, images = processor_settings(hf_dir)
    pixels = pixel_fields(hf_dir, images, "InternVL3", Image.Resampling.BICUBIC, IMAGENET)
    size = images.get("size") or {"height": 384, "width": 384}
    if size.get("height") != size.get("width"):
        raise ConfigError(f"{hf_dir}: tiles of {size} are not square, which is not built")
    per_tile = settings.get("image_seq_length", 256)
    if per_tile != model.tile_tokens(size["height"]):
        raise ConfigError(
            f"{hf_dir}: image_seq_length {per_tile}, but a tile of {size['height']} pixels gives the model "
            f"{model.tile_tokens(size['height'])} tokens"
        )
    return {
        "side": size["height"],
        "min_tiles": images.get("min_patches", 1),
        "max_tiles": images.get("max_patches", 12),
        "dynamic": True,
        "thumbnail": True,
        **pixels,
    }


def own_template(hf_dir: Path, content: dict[str, Any]) -> str:
    """Name of the prompt's form that a model was trained on: by its config.json, or by its chat template where that is ours.

    Raises:
        ConfigError: it is not built.
    """
    if NAMINGS[content["model_type"]] == "hf":
        written = chat_template(hf_dir)
        return next((name for name, form in PROMPTS.items() if form.jinja == written), DEFAULT)
    name = content.get("template") or DEFAULT
    if name not in PROMPTS:
        raise ConfigError(f"{hf_dir}: template {name!r} is not built for InternVL: {', '.join(PROMPTS)} are")
    return name


def _tokens_of(hf_dir: Path, model: InternVL3ModelConfig) -> dict[str, Any]:
    tokenizer = load_tokenizer(hf_dir)
    marks = (START, CONTEXT, STOP, OPEN, CLOSE)
    ids = token_ids(hf_dir, tokenizer.get_vocab().get, marks, "InternVL3")
    bos = tokenizer.bos_token_id
    return {
        "bos_token_id": bos if tokenizer("a").input_ids[0] == bos else None,
        **tokenizer_fields(hf_dir, tokenizer, ids[CONTEXT], model.image_token_id, model.text.vocab_size, marks),
        "start_token_id": ids[START],
        "stop_token_id": ids[STOP],
        "stop_ids": generation_stops(hf_dir, ids[CLOSE]),
    }


def stop_ids(hf_dir: Path) -> tuple[int, ...]:
    """Ids that end an answer of a model with the tokenizer files of ``hf_dir``."""
    return _tokens_of(hf_dir, InternVL3ModelConfig.from_hf(read_json(hf_dir / "config.json")))["stop_ids"]
