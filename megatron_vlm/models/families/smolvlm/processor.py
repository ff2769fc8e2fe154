"""Processor of Idefics3 and SmolVLM: prompts, image tokens and pixels equal to those of transformers' processors.

    turns --chat template, <image> -> tiles row by row, then the whole--> pieces --data.chat--> ids, labels
    images --upright RGB, longest edge, up to whole tiles--> rows x columns tiles and the whole, float32 [3, S, S] each

The prompt is that of ``models/processing/utterances.py`` behind BOS. An image of several tiles is written

    <fake_token_around_image><row_1_col_1><image>...<fake_token_around_image><row_1_col_2><image>...\\n
    ...\\n
    \\n<fake_token_around_image><global-img><image>...<fake_token_around_image>

and one that is not split by its last line alone. No loss is taken on any of it. A video is written

    You are provided the following series of two frames from a 0:00:09 [H:MM:SS] video.\n
    \n
    Frame from 00:00:<image>\n
    Frame from 00:08:<image>\n
    \n

An image announced so, or as ``Frame-1:``, is a frame of a video: never split, and resized as transformers' video processor
does, by torch. Semantics: transformers 5.23, models/idefics3, models/smolvlm.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import ceil
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.formats.records import VideoSettings
from megatron_vlm.data.images import tiling
from megatron_vlm.data.images.pictures import size_of_longest
from megatron_vlm.data.images.video import spelled
from megatron_vlm.data.sample import Turn, Video
from megatron_vlm.data.text.chat import Piece, Tokens, encode_pieces
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.families.smolvlm.config import SmolVLMModelConfig
from megatron_vlm.models.processing.conversation import ConversationProcessor, Size, data_fields
from megatron_vlm.models.processing.pixels import HALF, pixel_fields
from megatron_vlm.models.processing.processor_files import (
    check_image_settings,
    generation_stops,
    load_tokenizer,
    processor_settings,
    read_json,
    token_ids,
    tokenizer_fields,
    video_processor_settings,
)
from megatron_vlm.models.processing.utterances import END, FAKE, IMAGE, written_first
from megatron_vlm.models.processing.videos import FramePixels, in_words

WHOLE = "<global-img>"
_LONGEST = 4096  # transformers' processors go no further
_FRAME = re.compile(r"Frame(-?\d+| from \d+:\d\d): ?$")
Grid = tuple[int, int]
"""Of an image: rows and columns of tiles, (0, 0) where it is not split, ``FRAME`` of a video."""
FRAME: Grid = (0, -1)


@dataclass(frozen=True, kw_only=True)
class SmolVLMProcessor(FramePixels, ConversationProcessor):
    """Encodes samples for Idefics3 and SmolVLM. Plain values only: it travels to worker processes.

    Attributes:
        begin: text before the first turn; empty where the tokenizer itself puts BOS there.
        around: ids of what surrounds ``<image>`` tokens.
        tile_tokens: ``<image>`` tokens of a tile.
        tile_patches: patches of the tower of one.
        splitting: images are cut into tiles; else each is one.
        longest_edge: of an image before it is cut, in pixels.
        frame_edge: the same of a frame of a video, before it becomes a tile.
        side: of a tile, in pixels.
        frame_sampling: how frames of a video are taken.
    """

    begin: str
    around: tuple[int, ...]
    tile_tokens: int
    tile_patches: int
    splitting: bool
    longest_edge: int
    frame_edge: int
    side: int
    frame_sampling: VideoSettings

    @classmethod
    def from_pretrained(cls, hf_dir: str | Path, config: DataConfig) -> "SmolVLMProcessor":
        """Reads tokenizer, processor and model configuration of an HF folder.

        Raises:
            ConfigError: a file is missing, or a setting that is not built or cannot work.
        """
        hf_dir = Path(hf_dir)
        model = SmolVLMModelConfig.from_hf(read_json(hf_dir / "config.json"))
        config.check_template("smolvlm")
        check_image_settings(config, model.kind, "max_image_num", "image_size", "image_splitting")
        settings, images = processor_settings(hf_dir)
        pixels = pixel_fields(hf_dir, images, model.kind, Image.Resampling.LANCZOS, HALF, ["do_pad"])
        side = (images.get("max_image_size") or {}).get("longest_edge", 364)
        longest = config.image_size or (images.get("size") or {}).get("longest_edge", 4 * 364)
        tokens = settings.get("image_seq_len", 169)
        if side != model.vision.image_size or tokens != model.tile_tokens:
            raise ConfigError(
                f"{hf_dir}: the processor's tiles have {side} pixels a side and {tokens} tokens (max_image_size, "
                f"image_seq_len), the model's {model.vision.image_size} and {model.tile_tokens}"
            )
        if not side <= longest <= _LONGEST:
            raise ConfigError(f"longest edge {longest}: set data.image_size to {side}, one tile, up to {_LONGEST}")
        written = images.get("do_image_splitting", True)
        return cls(
            **_tokens_of(hf_dir, model, ceil(longest / side)),
            **pixels,
            **data_fields(config),
            tile_tokens=tokens,
            tile_patches=model.vision.side**2,
            splitting=written if config.image_splitting is None else config.image_splitting,
            longest_edge=longest,
            frame_edge=_frame_edge(hf_dir),
            side=side,
            frame_sampling=video_settings(hf_dir),
        )

    @property
    def never_cut(self) -> tuple[int, ...]:
        return (self.image_token_id, *self.around)

    def plans(self, turns: Sequence[Turn], sizes: Sequence[Size], options: Mapping[str, Any]) -> list[Grid]:
        before = [text for turn in turns for text in turn.text.split(IMAGE)[:-1]]  # of each placeholder
        return [FRAME if _FRAME.search(text) else self.grid(size) for text, size in zip(before, sizes)]

    @property
    def video(self) -> VideoSettings:
        return self.frame_sampling

    def written(self, turn: Turn) -> Turn:
        return spelled(turn, _video_text)

    def grid(self, size: Size) -> Grid:
        """Rows and columns of an image of (width, height)."""
        width, height = tiling.whole_tiles(*size_of_longest(*size, self.longest_edge), self.side)
        rows, columns = height // self.side, width // self.side
        return (rows, columns) if self.splitting and rows * columns > 1 else (0, 0)

    def patches(self, plan: Grid) -> int:
        return (1 if plan == FRAME else 1 + plan[0] * plan[1]) * self.tile_patches

    def views(self, image: Image.Image, plan: Grid, draw: Any) -> list[torch.Tensor]:
        """Pixels of an image's tiles row by row, then of the whole, bit for bit as transformers' ``*ImageProcessorPil``."""
        if plan == FRAME:
            return [self.frame(image, size_of_longest(*image.size, self.frame_edge), (self.side, self.side))]
        image = image.resize(size_of_longest(*image.size, self.longest_edge), resample=self.resample)
        cut, (rows, columns), side = [], plan, self.side
        if rows:
            image = image.resize((columns * side, rows * side), resample=self.resample)
            cut = tiling.cut(image, side)
        return [self.normalised(view) for view in (*cut, image.resize((side, side), resample=self.resample))]

    def tokenise(self, turns: Sequence[Turn], plans: Sequence[Grid], prompt: bool = False) -> Tokens:
        pieces, grids = [Piece(text=self.begin, loss=False)], iter(plans)
        for turn in turns:
            answer = turn.role == "assistant"
            pieces.append(Piece(text=f"{turn.role.capitalize()}:"))
            # The space is the model's to write: generation goes on from "Assistant:".
            texts = f"{'' if turn.text.startswith(IMAGE) else ' '}{turn.text}{END}".split(IMAGE)
            for number, text in enumerate(texts):
                if number:
                    pieces.append(Piece(text=self.image_text(*next(grids)), answer=answer, loss=False))
                if text:
                    pieces.append(Piece(text=text, answer=answer, loss=turn.loss))
            pieces.append(Piece(text="\n"))
        if prompt:
            pieces.append(Piece(text="Assistant:"))
        return encode_pieces(
            self.tokenizer, pieces, len(turns), answer_only=self.answer_loss_only, never=self.never_cut
        )

    def image_text(self, rows: int, columns: int) -> str:
        """What stands in the prompt for an image."""
        tile = IMAGE * self.tile_tokens
        lines = [
            "".join(f"{FAKE}<row_{row + 1}_col_{column + 1}>{tile}" for column in range(columns)) for row in range(rows)
        ]
        return "".join(f"{line}\n" for line in lines) + ("\n" if lines else "") + f"{FAKE}{WHOLE}{tile}{FAKE}"


def _video_text(video: Video) -> str:
    """The prompt of a video, as transformers' ``SmolVLMProcessor`` writes it."""
    lasts = timedelta(seconds=int(video.seconds))
    frames = "".join(f"\nFrame from {int(at // 60):02d}:{int(at % 60):02d}:{IMAGE}" for at in video.times)
    number = in_words(len(video.frames))
    return f"You are provided the following series of {number} frames from a {lasts} [H:MM:SS] video.\n{frames}\n\n"


def video_settings(hf_dir: Path) -> VideoSettings:
    """How the model's own processor takes frames of a video; as SmolVLM2's does, where the files know of none."""
    settings = video_processor_settings(hf_dir)
    own = settings.get("video_sampling") or {}
    most = own.get("max_frames") or settings.get("num_frames")
    return VideoSettings(sampling="ends", max_frames=most, fps=own.get("fps") or settings.get("fps"))


def _frame_edge(hf_dir: Path) -> int:
    settings = video_processor_settings(hf_dir)
    size = settings.get("size") or (settings.get("video_sampling") or {}).get("video_size") or {}
    return min(_LONGEST, size.get("longest_edge", 4 * 364))


def _tokens_of(hf_dir: Path, model: SmolVLMModelConfig, most: int = 0) -> dict[str, Any]:
    """Fields that the tokenizer's files decide; ``most`` rows and columns of tiles need a token each."""
    tokenizer = load_tokenizer(hf_dir)
    places = [f"<row_{row + 1}_col_{column + 1}>" for row in range(most) for column in range(most)]
    around = (FAKE, WHOLE, *places)
    ids = token_ids(hf_dir, tokenizer.get_vocab().get, (IMAGE, END, *around), model.kind)
    bos = tokenizer.bos_token or ""
    begin = written_first(hf_dir, tokenizer, model.kind, "", bos)
    begin = bos if begin is None else begin
    if bos and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        begin = ""
    steering = (*around, IMAGE, END, *([bos] if bos else []))
    fields = tokenizer_fields(hf_dir, tokenizer, ids[IMAGE], model.image_token_id, model.text.vocab_size, steering)
    stops = generation_stops(hf_dir, ids[END], tokenizer.eos_token_id)
    return {**fields, "begin": begin, "around": tuple(ids[token] for token in around), "stop_ids": stops}


def stop_ids(hf_dir: Path) -> tuple[int, ...]:
    """Ids that end an answer of a model with the tokenizer files of ``hf_dir``."""
    return _tokens_of(hf_dir, SmolVLMModelConfig.from_hf(read_json(hf_dir / "config.json")))["stop_ids"]
