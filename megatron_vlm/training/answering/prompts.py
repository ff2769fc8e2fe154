"""Questions to a model at hand, and the section ``evaluate`` of a run, which asks them while it trains."""

import dataclasses
from dataclasses import dataclass

from megatron_vlm.config import Config, PathText
from megatron_vlm.data.formats.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Record, RecordSource
from megatron_vlm.data.images.pictures import decode_image
from megatron_vlm.data.images.video import is_video
from megatron_vlm.data.row import EncodedSample
from megatron_vlm.data.sample import Turn
from megatron_vlm.data.shards.writer import load_record
from megatron_vlm.data.types import Processor
from megatron_vlm.errors import ConfigError, DataError, Reason
from megatron_vlm.scoring.metrics import check_metrics

MARKS = (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)


@dataclass(frozen=True, kw_only=True)
class Prompt(Config):
    """One question.

    Attributes:
        text: of the user; ``<image>`` and ``<video>`` mark places. Without any mark the files come first, a line each.
        images: files in order: images, videos and folders of a video's frames.
        system: a system turn before it; None: none (or the template's own).
    """

    text: str
    images: tuple[PathText, ...] = ()
    system: str | None = None

    @property
    def turns(self) -> tuple[Turn, ...]:
        text = self.text
        if not any(mark in text for mark in MARKS):
            text = "".join(f"{MARKS[is_video(file)]}\n" for file in self.images) + text
        system = [] if self.system is None else [Turn(role="system", text=self.system)]
        return (*system, Turn(role="user", text=text))


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Config):
    """Answers during training, greedy: of prompts to the log, TensorBoard and ``samples.jsonl``; of files scored in the metrics.

    Attributes:
        prompts: texts, or mappings with ``text``, ``images`` and ``system``.
        interval: iterations between them; they are also answered before the first and after the last. None: with each
            evaluation (``training.eval_interval``).
        max_new_tokens: most tokens of an answer.
        file: held-out files of records, whose last answers are asked for and scored, as `megatron-vlm evaluate` does.
        metrics: how; see scoring/metrics.py. They are ``eval_NAME`` in metrics.jsonl.
        format, image_root, limit: of ``file``: as of `data build`; folder of relative image paths; most records of each.
    """

    prompts: tuple[str | Prompt, ...] = ()
    interval: int | None = None
    max_new_tokens: int = 64
    file: tuple[PathText, ...] = ()
    metrics: tuple[str, ...] = ("exact_match",)
    format: str = "llava"
    image_root: PathText = "."
    limit: int | None = None

    def __post_init__(self) -> None:
        check_metrics(self.metrics)
        for name in ("interval", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"evaluate.{name} must be at least 1, got {value}")
        if self.interval is not None and not self.prompts and not self.file:
            raise ConfigError("evaluate.interval has no effect without evaluate.prompts or evaluate.file")
        given = {name: getattr(self, name) for name in ("metrics", "format", "image_root", "limit")}
        for field in dataclasses.fields(self) if not self.file else ():
            if given.get(field.name, field.default) != field.default:
                raise ConfigError(f"evaluate.{field.name} has no effect without evaluate.file: name held-out files")

    @property
    def questions(self) -> tuple[Prompt, ...]:
        return tuple(Prompt(text=p) if isinstance(p, str) else p for p in self.prompts)


def encode_prompt(processor: Processor, prompt: Prompt) -> EncodedSample:
    """Reads a prompt's images and videos and encodes it.

    Raises:
        DataError: a file that cannot be read, or another number of placeholders than of files.
    """
    kinds = [tuple(file for file in prompt.images if is_video(file) == kind) for kind in (False, True)]
    for mark, files in zip(MARKS, kinds):
        if (places := sum(turn.text.count(mark) for turn in prompt.turns)) != len(files):
            message = f"{places} {mark} placeholders for {len(files)} {mark[1:-1]}s"
            raise DataError(message, reason=Reason.PLACEHOLDERS)
    record = Record(number=0, label="", turns=prompt.turns, images=kinds[0], videos=kinds[1])
    turns, found = load_record(RecordSource(path="", format="prompt", root=""), record, processor.video)
    return processor.encode_prompt(turns, [decode_image(data, name) for name, data in found])
