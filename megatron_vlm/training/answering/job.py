"""A model of any kind, in any layout, that answers questions: what `generate` and `evaluate` share.

AskConfig --open_job--> Job --answers(questions)--> batches of (question, text), the same on every rank
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from megatron_vlm.config import Config, PathText
from megatron_vlm.conversion.load import load_model
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.formats import open_sources
from megatron_vlm.data.row import EncodedSample
from megatron_vlm.data.types import Processor
from megatron_vlm.digests import check_records
from megatron_vlm.errors import ConfigError
from megatron_vlm.files import check_output
from megatron_vlm.log import setup_logging
from megatron_vlm.models.built import Model
from megatron_vlm.models.generation import SamplingConfig
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.parallel.batch import together
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.heartbeat import Heartbeat
from megatron_vlm.parallel.rng import seed_step
from megatron_vlm.parallel.topology import build_topology, init_process_group
from megatron_vlm.training.answering.answers import answer
from megatron_vlm.training.device import start_device

Asked = TypeVar("Asked")


@dataclass(frozen=True, kw_only=True)
class AskConfig(Config):
    """Which model is asked what, and how it runs.

    Attributes:
        load: HF directory or hub id, Megatron weights, a training checkpoint, or an adapter's folder.
        base: where the base of an adapter is; None: where its files say.
        verify_hashes: compare the files with the digests that were recorded of them.
        family: checked against what ``load`` holds.
        input: files of records, whose last answer is asked for; the one they have is kept as ``reference``.
        format: of ``input``, as of ``data build``.
        image_root: folder that relative image paths of ``input`` start from.
        limit: most records of each input.
        sampling: how answers are drawn.
        parallel: the layout; data parallel ranks share the records.
        precision: dtype of the weights.
        device: where to run; None: cuda if there is a GPU.
        data: how images are treated, as in training (``image_size`` and the like).
    """

    load: PathText
    base: PathText | None = None
    verify_hashes: bool = True
    family: str | None = None
    input: tuple[PathText, ...] = ()
    format: str = "llava"
    image_root: PathText = "."
    limit: int | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["cpu", "cuda"] | None = None
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit must be at least 1, got {self.limit}")
        if self.precision == "fp16" and self.device == "cpu":
            raise ConfigError("fp16 does not run on the CPU: use fp32 or bf16 there")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model that is ready.

    Attributes:
        model, processor: of it.
        positions: most tokens of a prompt and its answer.
        folders: the weights lie in.
        sampling: how it answers.
    """

    model: Model
    processor: Processor
    positions: int
    folders: Sequence[Path]
    sampling: SamplingConfig

    @property
    def first(self) -> bool:
        """This rank writes."""
        return dist.get_rank() == 0

    def answers(
        self, asked: Iterator[tuple[Asked, EncodedSample]], number: int = 0
    ) -> Iterator[list[tuple[Asked, str]]]:
        """Yields the answers batch by batch, on every rank. A collective of the whole job.

        Args:
            asked: the same on every rank; an error of it is raised on every rank.
            number: of the first, which keys its draws.
        """
        device = self.model.device
        while True:
            with together(device):
                batch = list(islice(asked, self.sampling.batch_size * self.model.topology.dp))
            if not batch:
                return
            samples = [sample for _, sample in batch]
            texts = answer(self.model, self.processor, samples, self.sampling, number)
            number += len(batch)
            yield [(question, text) for (question, _), text in zip(batch, texts)]


@contextmanager
def open_job(config: AskConfig, heartbeat: Heartbeat, outputs: Sequence[tuple[str, Path]] = ()) -> Iterator[Job]:
    """Opens the model on this rank. A collective of the whole job.

    Args:
        config: of the job.
        heartbeat: of this process.
        outputs: (flag, path) of what will be written: none may be an input or lie in the model.

    Raises:
        MegatronVLMError: on every rank, with the setting that cannot be used.
    """
    device = start_device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    init_process_group(device, config.parallel.distributed_timeout_minutes, heartbeat)
    rank = dist.get_rank()
    setup_logging(rank)
    with together(device):
        for flag, path in outputs:
            _check_out(config, flag, path)
        verify = config.verify_hashes and os.environ.get("LOCAL_RANK", "0") == "0"  # of small files: once a machine
        source = open_source(config.load, config.family, config.base, verify_hashes=verify)
        for flag, path in outputs:
            check_output(path, source.folders(), flag)
    with source:
        with together(device):
            if config.verify_hashes:
                check_records(source.records(), share=rank, shares=dist.get_world_size())
        text = source.config.text
        topology = build_topology(config.parallel, num_layers=text.num_layers, device=device)
        options = ModelOptions(
            params_dtype=config.precision,
            sequence_parallel=config.parallel.sequence_parallel,
            make_vocab_size_divisible_by=1,
        )
        with together(device):
            data = DataConfig.from_dict({"seq_length": text.longest, **config.data}, "data")
            processor = source.spec.open_processor(source.hf_dir, data)
            model = load_model(source, topology, options)
        folders = [Path(folder) for folder in source.folders()]
    seed_step(topology, seed=config.sampling.seed, iteration=0)
    yield Job(model=model, processor=processor, positions=text.longest, folders=folders, sampling=config.sampling)


def _check_out(config: AskConfig, flag: str, path: Path) -> None:
    """Refuses answers in place of what is asked, or in a model: opening the output would empty what is read after it."""
    check_output(path, [folder for folder in (config.load, config.base) if folder is not None], flag)
    if not path.exists():
        return
    sources = open_sources(config.format, config.input, root=config.image_root)
    for read in [*config.input, *(source.path for source in sources)]:
        if os.path.exists(read) and os.path.samefile(read, path):
            raise ConfigError(f"{flag} {path} is the input {read}: the answers would replace it; name another file")
