"""Answers to prompts by a model at hand: sample answers during training, and ``megatron-vlm generate``.

prompts --processor.encode_prompt--> samples --dealt to replicas, batch by batch--> models.generation --decode--> texts
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from megatron_vlm.data.row import EncodedSample
from megatron_vlm.data.types import Processor
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.built import Model
from megatron_vlm.models.generation import SamplingConfig, generate


def check_length(sample: EncodedSample, positions: int, sampling: SamplingConfig, what: str) -> None:
    """Raises ConfigError unless a prompt and its answer fit the model's positions."""
    tokens = len(sample.input_ids)
    if tokens + sampling.max_new_tokens > positions:
        raise ConfigError(
            f"{what}: {tokens} tokens and an answer of up to {sampling.max_new_tokens} are beyond the model's {positions} "
            "positions: shorten it, give fewer or smaller images, or lower max_new_tokens"
        )


def answer(
    model: Model,
    processor: Processor,
    prompts: Sequence[EncodedSample],
    sampling: SamplingConfig,
    first_number: int = 0,
) -> list[str]:
    """Texts of the answers, on every rank. A collective of the whole job.

    Args:
        model: its replicas share the prompts; in lockstep each answers all.
        processor: of the family.
        prompts: the same on every rank.
        sampling: how tokens are chosen.
        first_number: of the first prompt, which keys its draws.
    """
    topology, size = model.topology, sampling.batch_size
    batches = [range(first, min(len(prompts), first + size)) for first in range(0, len(prompts), size)]
    texts: dict[int, str] = {}
    shares = 1 if model.lockstep else topology.dp
    for batch in batches[topology.dp_rank % shares :: shares]:
        found = generate(
            model,
            [prompts[i] for i in batch],
            sampling,
            stop_ids=processor.stop_ids,
            filler_token_id=processor.filler_token_id,
            first_number=first_number + batch[0],
        )
        texts |= {i: processor.decode(answer.ids) for i, answer in zip(batch, found)}
    if shares > 1:
        gathered: list[Any] = [None] * topology.dp
        dist.all_gather_object(gathered, texts, group=topology.dp_group)
        texts = {i: text for part in gathered for i, text in part.items()}
    return [texts[i] for i in range(len(prompts))]
