"""Answers to prompts by a model at hand: sample answers during training, and ``megatron-vlm generate``.

prompts --processor.encode_prompt--> samples --dealt to replicas, batch by batch--> models.generation --decode--> texts
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_vlm.config import Config, PathText
from megatron_vlm.data.images.pictures import decode_image
from megatron_vlm.data.row import EncodedSample
from megatron_vlm.data.types import Turn
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.files import read_bytes
from megatron_vlm.models.generation import SamplingConfig, generate
from megatron_vlm.parallel.topology import Topology

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


def encode_prompt(processor: Any, prompt: Prompt) -> EncodedSample:
    """Reads a prompt's images and encodes it.

    Raises:
        DataError: an image that cannot be read, or another number of placeholders than of images.
    """
    images = [decode_image(read_bytes(name, DataError), name) for name in prompt.images]
    return processor.encode_prompt(prompt.turns, images)


def check_length(sample: EncodedSample, positions: int, sampling: SamplingConfig, what: str) -> None:
    """Raises ConfigError unless a prompt and its answer fit the model's positions."""
    tokens = len(sample.input_ids)
    if tokens + sampling.max_new_tokens > positions:
        raise ConfigError(
            f"{what}: {tokens} tokens and an answer of up to {sampling.max_new_tokens} are beyond the model's {positions} "
            "positions: shorten it, give fewer or smaller images, or lower max_new_tokens"
        )


def answer(
    chunks: Sequence[Any],
    topology: Topology,
    processor: Any,
    prompts: Sequence[EncodedSample],
    sampling: SamplingConfig,
    first_number: int = 0,
) -> list[str]:
    """Texts of the answers, on every rank. A collective of the whole job.

    Args:
        chunks: this rank's stages.
        topology: the layout; replicas share the prompts.
        processor: of the family.
        prompts: the same on every rank.
        sampling: how tokens are chosen.
        first_number: of the first prompt, which keys its draws.
    """
    size = sampling.batch_size
    batches = [range(first, min(len(prompts), first + size)) for first in range(0, len(prompts), size)]
    texts: dict[int, str] = {}
    for batch in batches[topology.dp_rank :: topology.dp]:
        found = generate(
            chunks,
            [prompts[i] for i in batch],
            topology,
            sampling,
            stop_ids=processor.stop_ids,
            filler_token_id=processor.filler_token_id,
            first_number=first_number + batch[0],
        )
        texts |= {i: processor.decode(answer.ids) for i, answer in zip(batch, found)}
    if topology.dp > 1:
        gathered: list[Any] = [None] * topology.dp
        dist.all_gather_object(gathered, texts, group=topology.dp_group)
        texts = {i: text for part in gathered for i, text in part.items()}
    return [texts[i] for i in range(len(prompts))]
