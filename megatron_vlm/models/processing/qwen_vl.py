"""What the processors of Qwen2.5-VL and Qwen3-VL share: prompts, image tokens, pixels and positions equal to transformers' own.

    turns --chat template, <image> -> <|vision_start|><|image_pad|> x n<|vision_end|>--> ids, labels: answer, <|im_end|>
    images --resize to whole blocks, between min and max pixels--> uint8 --table--> float32 [3, H, W]
    videos, <video> -> <|vision_start|><|video_pad|> x n<|vision_end|>: two frames after the other are one --> float32 [6, H, W]
    ids, grids, times --M-RoPE--> positions [3, L]

Where a template has a system line, a conversation begins with it unless its first turn is a system turn. A family without
``video_token_id`` has no videos: their frames are images.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.formats.records import OWN_VIDEO, VideoSettings
from megatron_vlm.data.images.pictures import size_of_blocks
from megatron_vlm.data.images.video import LEAST_PAIRS
from megatron_vlm.data.row import EncodedSample
from megatron_vlm.data.sample import Turn, Video
from megatron_vlm.data.text.chat import Piece, Tokens, encode_pieces
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.hf_config import require
from megatron_vlm.models.parts.qwen_vit import QwenVLConfig
from megatron_vlm.models.processing.chat_template import chat_template, render
from megatron_vlm.models.processing.conversation import ConversationProcessor, Size, data_fields
from megatron_vlm.models.processing.mrope import mrope_positions
from megatron_vlm.models.processing.pixels import CLIP, pixel_fields
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
from megatron_vlm.models.processing.videos import FramePixels

IMAGE, VIDEO = "<image>", "<video>"
START, PAD, VIDEO_PAD, END = "<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"
PAIR = 2  # frames of a patch
_VIDEO_SETTINGS = ("video_min_pixels", "video_max_pixels", "video_total_pixels")
_MARKS = re.compile(f"{IMAGE}|{VIDEO}")
_FRAME_PIXELS = (128 * 28 * 28, 768 * 28 * 28)  # of transformers' video processor, where the files do not say
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
        videos: they are built.
    """

    name: str
    family: str
    system: str
    config: Callable[[dict[str, Any]], QwenVLConfig]
    videos: bool = False


@dataclass(frozen=True, kw_only=True)
class QwenVLProcessor(FramePixels, ConversationProcessor):
    """Encodes samples. Plain values only: it travels to worker processes.

    Attributes:
        system: see QwenKind.
        video_token_id: id of ``<|video_pad|>``; None: videos are not built.
        tokens_per_second: positions of a second of a video.
        mark_ids: ids of ``<|vision_start|>`` and ``<|vision_end|>``.
        unit: pixels of a side of a block, which becomes one token.
        block_patches: patches of a block.
        min_pixels, max_pixels: of a resized image.
        frame_pixels: least and most of a frame of a video.
        total_pixels: most of all frames of a video that patches see; None: no limit.
        frame_sampling: how frames of a video are taken.
    """

    system: str
    video_token_id: int | None = None
    tokens_per_second: float = 1.0
    mark_ids: tuple[int, int]
    unit: int
    block_patches: int
    min_pixels: int
    max_pixels: int
    frame_pixels: tuple[int, int] = (0, 0)
    total_pixels: int | None = None
    frame_sampling: VideoSettings = OWN_VIDEO

    @property
    def image_ids(self) -> tuple[int, ...]:
        return (self.image_token_id, *([] if self.video_token_id is None else [self.video_token_id]))

    @property
    def never_cut(self) -> tuple[int, ...]:
        return (*self.image_ids, *self.mark_ids)

    @property
    def video(self) -> VideoSettings:
        return self.frame_sampling

    def written(self, turn: Turn) -> Turn:
        return super().written(turn) if self.video_token_id is None else turn

    def plans(self, turns: Sequence[Turn], sizes: Sequence[Size], options: Mapping[str, Any]) -> list["Plan"]:
        made, left = [], iter(sizes)
        for video in seen(turns):
            if video is None:
                made.append(Plan(*size_of_blocks(*next(left), self.unit, self.min_pixels, self.max_pixels)))
            else:
                made += self._frames(video, list(islice(left, len(video.frames))))
        return made

    def _frames(self, video: Video, sizes: Sequence[Size]) -> list["Plan"]:
        """All of them have the size of the first; the last of an odd number stands for two, as an image does."""
        least, most = self.frame_pixels
        if self.total_pixels is not None:
            most = max(min(most, self.total_pixels * PAIR // len(sizes)), int(least * 1.05))
        size = size_of_blocks(*sizes[0], self.unit, least, most)
        seconds = PAIR / (len(sizes) / video.total * video.fps)  # of a pair; 32 bits, as transformers keeps them
        interval = self.tokens_per_second * float(np.float32(seconds))
        pairs, single = divmod(len(sizes), PAIR)
        frames = [*(PAIR, 0) * pairs, *(1,) * single]
        return [
            Plan(*size, number, (0, 0.0) if index else (pairs + single, interval), True)
            for index, number in enumerate(frames)
        ]

    def patches(self, plan: "Plan") -> int:
        return plan.columns * plan.rows * self.block_patches if plan.frames else 0

    def pixels_of(self, images: Sequence[Image.Image], plans: Sequence["Plan"], draw: Any) -> tuple[Tensor, ...]:
        return tuple(
            torch.cat([self._view(images[number + further], plan) for further in range(plan.frames)])
            for number, plan in enumerate(plans)
            if plan.frames
        )

    def _view(self, image: Image.Image, plan: "Plan") -> Tensor:
        size = (plan.columns * self.unit, plan.rows * self.unit)
        return self.frame(image, size) if plan.moves else self.normalised(image.resize(size, resample=self.resample))

    def tokenise(self, turns: Sequence[Turn], plans: Sequence["Plan"], prompt: bool = False) -> Tokens:
        """The whole conversation is tokenised as one text, as transformers does, with one ``<|image_pad|>`` an image."""
        given = not self.system or (turns and turns[0].role == "system")
        lines = list(turns) if given else [Turn(role="system", text=self.system), *turns]
        pieces: list[Piece] = []
        for turn in lines:
            text = turn.text.replace(IMAGE, f"{START}{PAD}{END}")
            text = text.replace(VIDEO, f"{START}{VIDEO_PAD}{END}", len(turn.videos)) if turn.videos else text
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
        images = np.isin(tokens.ids, self.image_ids)
        repeats = np.ones(len(images), dtype=np.int64)
        lengths = [plan.columns * plan.rows * plan.begins[0] for plan in plans if plan.begins[0]]
        repeats[images] = lengths[: int(images.sum())]
        return dataclasses.replace(
            tokens,
            ids=tokens.ids.repeat(repeats),
            supervised=tokens.supervised.repeat(repeats),
            answer_start=int(repeats[: tokens.answer_start].sum()),
        )

    def _sample(self, key: str, ids: Tensor, labels: Tensor, images: Any, plans: Any, draw: Any) -> EncodedSample:
        sample = super()._sample(key, ids, labels, images, plans, draw)
        first = [plan for plan in plans if plan.begins[0]]
        grids = [(plan.begins[0], plan.rows, plan.columns) for plan in first]
        held = torch.isin(ids, torch.tensor(self.image_ids))
        positions = mrope_positions(held, grids, [plan.begins[1] for plan in first])
        return dataclasses.replace(sample, position_ids=positions)


class Plan(NamedTuple):
    """How an image, or a frame of a video, is seen.

    Attributes:
        columns, rows: of its blocks.
        frames: that its patches span: 1 of an image, of a video 2 at the first of a pair and 0 at the second.
        begins: pairs of frames, and positions from one to the next, of the image or video that begins with it; (0, 0): none.
        moves: it is a frame of a video.
    """

    columns: int
    rows: int
    frames: int = 1
    begins: tuple[int, float] = (1, 1.0)
    moves: bool = False


def seen(turns: Sequence[Turn]) -> Iterator[Video | None]:
    """Yields the videos of turns, and None for an image, in the order of their places."""
    for turn in turns:
        videos = list(turn.videos)
        for mark in _MARKS.findall(turn.text):
            if mark == IMAGE:
                yield None
            elif videos:
                yield videos.pop(0)


def processor_fields(hf_dir: Path, config: DataConfig, kind: QwenKind) -> dict[str, Any]:
    """Fields of ``QwenVLProcessor`` from tokenizer, processor and model configuration of an HF folder.

    Raises:
        ConfigError: a file is missing, or a setting that is not built or cannot work.
    """
    model = kind.config(read_json(hf_dir / "config.json"))
    config.check_template(kind.family)
    names = _VIDEO_SETTINGS if kind.videos else ()
    check_image_settings(config, kind.name, "max_image_num", "min_pixels", "max_pixels", *names)
    _, images = processor_settings(hf_dir)
    vision, size = model.vision, images.get("size") or {}
    sides = dict(zip(_SIDES, (vision.patch_size, vision.block, vision.temporal_patch_size)))
    pixels = _pixel_fields(hf_dir, images, kind, sides)
    if kind.videos:
        videos = video_processor_settings(hf_dir)
        for name, value in _pixel_fields(hf_dir, videos, kind, sides, " of videos").items():
            require(f"{hf_dir}: {name} of videos", value, pixels[name], "images with this one")
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
        **pixels,
        **data_fields(config),
        system=kind.system,
        unit=vision.unit,
        block_patches=vision.block**2,
        min_pixels=least,
        max_pixels=most,
        **(_video_fields(hf_dir, config, vision.unit) if kind.videos else {}),
    )


def _pixel_fields(
    hf_dir: Path, settings: dict[str, Any], kind: QwenKind, sides: Mapping[str, int], of: str = ""
) -> dict[str, Any]:
    for name, wanted in sides.items():
        require(f"{hf_dir}: {name}{of}", settings.get(name, _SIDES[name]), wanted, "this model's tower")
    return pixel_fields(hf_dir, settings, f"{kind.name}{of}", Image.Resampling.BICUBIC, CLIP)


def _video_fields(hf_dir: Path, config: DataConfig, unit: int) -> dict[str, Any]:
    settings = video_processor_settings(hf_dir)
    size = settings.get("size") or {}
    least, most = (
        getattr(config, f"video_{name}_pixels") or settings.get(f"{name}_pixels") or size.get(f"{edge}_edge") or default
        for name, edge, default in zip(("min", "max"), ("shortest", "longest"), _FRAME_PIXELS)
    )
    if not unit**2 <= most or least > most:
        raise ConfigError(
            f"a frame of a video has {least} to {most} pixels, of which one block of {unit}x{unit} is the least: set "
            "data.video_min_pixels and data.video_max_pixels, in order"
        )
    total = config.video_total_pixels
    if total is None and settings.get("cap_pixels_per_frame"):
        total = int(settings.get("max_video_tokens", 128_000) * unit**2 * 0.9)
    return dict(frame_pixels=(least, most), total_pixels=total, frame_sampling=video_settings(hf_dir))


def video_settings(hf_dir: Path) -> VideoSettings:
    """How the model's own processor takes frames of a video; two a second where the files do not say.

    Raises:
        ConfigError: a fixed number of frames, or another least one.
    """
    settings = video_processor_settings(hf_dir)
    for name, wanted in (("num_frames", None), ("min_frames", LEAST_PAIRS)):
        if settings.get(name) not in (None, wanted):
            raise ConfigError(
                f"{hf_dir}: {name} {settings[name]!r} of videos is not built: leave it out, and say fps or max_frames"
            )
    return VideoSettings(sampling="pairs", max_frames=settings.get("max_frames"), fps=settings.get("fps"))


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
