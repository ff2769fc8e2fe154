"""A model of any kind, in any layout, that answers questions: what `generate` and `evaluate` share.

AskConfig --open_job--> Job --answers(questions)--> batches of (question, text), the same on every rank
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from megatron_vlm.config import Config, PathText
from megatron_vlm.conversion.convert import pixels_of
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
from megatron_vlm.parallel.topology import Topology, build_topology, init_process_group
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.training.answering.answers import answer
from megatron_vlm.training.answering.questions import Question
from megatron_vlm.training.device import start_device

Asked = TypeVar("Asked")
Precision = Literal["fp32", "bf16", "fp16"]


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
        data: how images are treated, as in training (``image_size`` and the like); bounds of pixels are those of training.
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
    precision: Precision = "fp32"
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

    def ask(
        self, asked: Iterable[Question], number: int = 0, *, blind: bool = False
    ) -> Iterator[list[tuple[Question, str]]]:
        """Yields the answers to records, as ``answers``; ``blind``: asked without their images."""
        return self.answers(
            ((q, q.encode(self.processor, self.positions, self.sampling, blind=blind)) for q in asked), number
        )


@contextmanager
def opened(
    open_it: Callable[[bool], AbstractContextManager[WeightSource]], verify_hashes: bool, device: torch.device
) -> Iterator[WeightSource]:
    """Opens a model on every rank of the job. A collective of it.

    Args:
        open_it: opens it; whether its small files are compared with their digests, which is done once a machine.
        verify_hashes: compare all files, tensors by all ranks in shares.
        device: of this rank.

    Raises:
        MegatronVLMError: on every rank.
    """
    with ExitStack() as stack:
        with together(device):
            source = stack.enter_context(open_it(verify_hashes and os.environ.get("LOCAL_RANK", "0") == "0"))
        with together(device):
            if verify_hashes:
                check_records(source.records(), share=dist.get_rank(), shares=dist.get_world_size())
        yield source


def load_for_answers(
    source: WeightSource,
    topology: Topology,
    precision: Precision,
    data: Mapping[str, Any],
    *,
    sequence_parallel: bool = False,
) -> tuple[Model, Processor]:
    """Loads a model and its processor. A collective of the job.

    Args:
        source: the model.
        topology: its layout.
        precision: dtype of the weights.
        data: how images are treated, as in training.
        sequence_parallel: see ParallelConfig.

    Raises:
        MegatronVLMError: on every rank.
    """
    options = ModelOptions(params_dtype=precision, sequence_parallel=sequence_parallel, make_vocab_size_divisible_by=1)
    with together(topology.device):
        return load_model(source, topology, options), processor_for(source, data)


def processor_for(source: WeightSource, data: Mapping[str, Any]) -> Processor:
    """The model's processor; bounds of pixels that ``data`` leaves out are those of the run that trained it.

    Raises:
        ConfigError: a setting that cannot be used.
    """
    given = {name: value for name, value in data.items() if value is not None}
    config = DataConfig.from_dict({"seq_length": source.config.text.longest, **pixels_of(source), **given}, "data")
    return source.spec.open_processor(source.hf_dir, config)


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
    setup_logging(dist.get_rank())
    with together(device):
        for flag, path in outputs:
            _check_out(config, flag, path)

    def open_it(verify: bool) -> WeightSource:
        return open_source(config.load, config.family, config.base, verify_hashes=verify)

    with opened(open_it, config.verify_hashes, device) as source:
        with together(device):
            for flag, path in outputs:
                check_output(path, source.folders(), flag)
        parallel, text = config.parallel, source.config.text
        topology = build_topology(parallel, num_layers=text.num_layers, device=device)
        model, processor = load_for_answers(
            source, topology, config.precision, config.data, sequence_parallel=parallel.sequence_parallel
        )
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
