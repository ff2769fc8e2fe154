"""Answers, token by token, with a cache of keys and values, in any tensor and pipeline parallel layout.

    prompts --laid end to end--> one row --all stages--> logits after each prompt --greedy or sampled--> one token each
       ^-- the next row: one token per unfinished answer, keys and values of the rest cached on their stages --+

The rank that knows the logits chooses; the others of its replica are told.
"""

import hashlib
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlm.config import Config
from megatron_vlm.data.row import IGNORE_INDEX, EncodedSample, Row, row_from_samples
from megatron_vlm.errors import ConfigError
from megatron_vlm.layers.core_attention import KVCache, RowParams
from megatron_vlm.models.built import Model, unwrapped
from megatron_vlm.parallel.batch import device_batch
from megatron_vlm.parallel.topology import Topology


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Config):
    """How answers are drawn.

    Attributes:
        max_new_tokens: most tokens of an answer.
        temperature: 0 takes the likeliest token each time (greedy); above, logits are divided by it and drawn from.
        top_p: draw among the likeliest tokens that together have this probability.
        seed: of the draws; with a prompt's number it keys them, whatever else is in the batch.
        batch_size: prompts that are answered together.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.temperature < math.inf:  # not a number either
            raise ConfigError(f"temperature must be a number, 0 or above, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_p < 1 and not self.temperature:
            raise ConfigError(f"top_p {self.top_p} has no effect at temperature 0: set a temperature")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Token ids of an answer, the stop token left out; ``finished``: the model ended it itself."""

    ids: tuple[int, ...]
    finished: bool


def generate(
    model: Model,
    prompts: Sequence[EncodedSample],
    sampling: SamplingConfig,
    *,
    stop_ids: Sequence[int],
    filler_token_id: int = 0,
    first_number: int = 0,
) -> list[Answer]:
    """Answers some prompts together; arguments as of ``stream``. A collective of one replica's ranks."""
    answers: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    for tokens in stream(
        model,
        prompts,
        sampling,
        stop_ids=stop_ids,
        filler_token_id=filler_token_id,
        first_number=first_number,
    ):
        for prompt, token in tokens.items():
            if token is None:
                finished[prompt] = True
            else:
                answers[prompt].append(token)
    return [Answer(ids=tuple(ids), finished=end) for ids, end in zip(answers, finished)]


@torch.no_grad()
def stream(
    model: Model,
    prompts: Sequence[EncodedSample],
    sampling: SamplingConfig,
    *,
    stop_ids: Sequence[int],
    filler_token_id: int = 0,
    first_number: int = 0,
) -> Generator[dict[int, int | None], None, None]:
    """Answers some prompts together, token by token. A collective of one replica's ranks, which go equally far.

    Args:
        model: its stages wrapped in DDP or not.
        prompts: at least one; the same on every rank of the replica (pixels are read on its source alone).
        sampling: how tokens are chosen.
        stop_ids: tokens that end an answer.
        filler_token_id: of rows under sequence parallelism.
        first_number: of the first prompt among all, which keys its draws.

    Yields:
        {place of a prompt that is not finished: its next token, or None where the model ends its answer}.
    """
    topology, stages = model.topology, [unwrapped(stage) for stage in model]
    with model.evaluating():
        multiple = topology.tp if stages[0].config.sequence_parallel else 1
        generators = [_generator(sampling.seed, first_number + i) for i in range(len(prompts))]
        active = list(range(len(prompts)))
        cache = KVCache()
        row = row_from_samples(prompts, filler_token_id=filler_token_id, multiple_of=multiple)
        counts = [len(prompt.input_ids) for prompt in prompts]
        following = [int(prompt.position_ids.max()) + 1 for prompt in prompts]  # a token may have several positions
        for number in range(sampling.max_new_tokens):
            params = cache.row(counts, row.num_filler, topology.device)
            logits = _forward(stages, row, params, topology)
            tokens = _choose(logits, sampling, [generators[i] for i in active], model)
            yield {prompt: None if token in stop_ids else token for prompt, token in zip(active, tokens)}
            going = [place for place, token in enumerate(tokens) if token not in stop_ids]
            active = [active[place] for place in going]
            if not active or number + 1 == sampling.max_new_tokens:
                return
            if len(going) < len(tokens):
                cache.keep(going)
            places = [following[prompt] + number for prompt in active]
            row = _next_row([tokens[place] for place in going], places, filler_token_id, multiple)
            counts = [1] * len(active)


def _generator(seed: int, number: int) -> torch.Generator:
    # The CPU generator reads 32 bits of a seed, so both numbers are hashed into them.
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _next_row(tokens: Sequence[int], positions: Sequence[int], filler_token_id: int, multiple: int) -> Row:
    """A row of one token per answer, at the position after what it has."""
    filler = -len(tokens) % multiple
    ids = torch.tensor([*tokens, *[filler_token_id] * filler])
    places = torch.tensor([*positions, *range(filler)])
    made = {"input_ids": ids, "position_ids": places, "labels": torch.full_like(ids, IGNORE_INDEX)}
    return Row.of(made, [1] * len(tokens) + ([filler] if filler else []), num_filler=filler)


def _forward(stages: Sequence[Any], row: Row, params: RowParams, topology: Topology) -> Tensor | None:
    """Runs a row through all stages, in order; the last stage's ranks return logits [N, V], the others None."""
    before, after = (topology.grid.neighbour(topology.rank, "pp", offset) for offset in (-1, 1))
    output = None
    for stage in stages:
        if not stage.pre_process:
            config = stage.config
            length = len(row.input_ids) // (topology.tp if config.sequence_parallel else 1)
            width = stage.language_model.input_size if row.pixels else config.hidden_size
            hidden = torch.empty(length, 1, width, dtype=config.params_dtype, device=topology.device)
            dist.recv(hidden, before)
            stage.set_input_tensor(hidden)
        batch = device_batch(topology, row, pixels=stage.pre_process, dtype=stage.config.params_dtype, whole=True)
        output = stage.next_logits(batch, params)
        if not stage.post_process:
            dist.send(output.contiguous(), after)
            output = None
    return output


def _choose(
    logits: Tensor | None, sampling: SamplingConfig, generators: Sequence[torch.Generator], model: Model
) -> list[int]:
    """The next token of each answer, on every rank of the replica, or in lockstep of the job."""
    topology = model.topology
    source, group = (0, None) if model.lockstep else (topology.last_stage_source, topology.replica_group)
    tokens = torch.zeros(len(generators), dtype=torch.int64, device=topology.device)
    if topology.rank == source:
        assert logits is not None
        tokens = logits.argmax(-1) if not sampling.temperature else _draw(logits, sampling, generators)
    if topology.replica_size > 1 or group is None:
        dist.broadcast(tokens, source, group=group)
    return tokens.tolist()


def _draw(logits: Tensor, sampling: SamplingConfig, generators: Sequence[torch.Generator]) -> Tensor:
    """Draws from the nucleus of each row (Holtzman et al. 2020); the likeliest token always belongs to it."""
    probabilities, order = (logits.float() / sampling.temperature).softmax(-1).cpu().sort(descending=True)
    outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
    probabilities = probabilities.masked_fill(outside, 0.0)
    chosen = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators)]
    return order.gather(-1, torch.stack(chosen))[:, 0].to(logits.device)
