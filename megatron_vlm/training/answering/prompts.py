"""Questions to a model at hand, and the section ``evaluate`` of a run, which asks them while it trains."""

import dataclasses
from dataclasses import dataclass

from megatron_vlm.config import Config, PathText
from megatron_vlm.data.images.pictures import decode_image
from megatron_vlm.data.row import EncodedSample
from megatron_vlm.data.sample import Turn
from megatron_vlm.data.types import Processor
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.files import read_bytes
from megatron_vlm.scoring.metrics import check_metrics

PLACEHOLDER = "<image>"


@dataclass(frozen=True, kw_only=True)
class Prompt(Config):
    """One question.

    Attributes:
        text: of the user; ``<image>`` marks an image's place. Without any mark the images come first, a line each.
        images: files, in order.
        system: a system turn before it; None: none (or the template's own).
    """

    text: str
    images: tuple[PathText, ...] = ()
    system: str | None = None

    @property
    def turns(self) -> tuple[Turn, ...]:
        text = self.text
        if PLACEHOLDER not in text:
            text = f"{PLACEHOLDER}\n" * len(self.images) + text
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
    """Reads a prompt's images and encodes it.

    Raises:
        DataError: an image that cannot be read, or another number of placeholders than of images.
    """
    images = [decode_image(read_bytes(name, DataError), name) for name in prompt.images]
    return processor.encode_prompt(prompt.turns, images)
