"""Questions to a model at hand, and the section ``evaluate`` of a run, which asks them while it trains."""

from dataclasses import dataclass

from megatron_vlm.config import Config, PathText
from megatron_vlm.data.images.pictures import decode_image
from megatron_vlm.data.row import EncodedSample
from megatron_vlm.data.sample import Turn
from megatron_vlm.data.types import Processor
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.files import read_bytes

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
    """Sample answers during training, greedy, to the log, TensorBoard and ``samples.jsonl``.

    Attributes:
        prompts: texts, or mappings with ``text``, ``images`` and ``system``.
        interval: iterations between them; they are also answered before the first and after the last. None: with each
            evaluation (``training.eval_interval``).
        max_new_tokens: most tokens of an answer.
    """

    prompts: tuple[str | Prompt, ...] = ()
    interval: int | None = None
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("interval", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"evaluate.{name} must be at least 1, got {value}")
        if self.interval is not None and not self.prompts:
            raise ConfigError("evaluate.interval has no effect without evaluate.prompts")

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
