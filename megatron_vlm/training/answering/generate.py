"""``megatron-vlm generate``: questions to a checkpoint of any kind, in any layout.

--load (HF, Megatron weights, training checkpoint) --load_model--> model --answers.answer--> standard output | JSON lines
--prompt, --image | --input records ------------------------------^
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

import torch

from megatron_vlm.config import Config, PathText
from megatron_vlm.conversion.load import load_model
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.formats import open_sources, read_source
from megatron_vlm.data.images.pictures import decode_image
from megatron_vlm.data.row import EncodedSample
from megatron_vlm.data.shards.writer import load_record
from megatron_vlm.data.types import Processor
from megatron_vlm.digests import check_records
from megatron_vlm.errors import ConfigError, DataError
from megatron_vlm.files import check_output, writing
from megatron_vlm.log import setup_logging
from megatron_vlm.models.generation import SamplingConfig
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.parallel.batch import together
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.heartbeat import Heartbeat
from megatron_vlm.parallel.rng import seed_step
from megatron_vlm.parallel.topology import build_topology, init_process_group
from megatron_vlm.training.answering.answers import answer, check_length
from megatron_vlm.training.answering.prompts import Prompt, encode_prompt
from megatron_vlm.training.device import start_device


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Config):
    """What is asked, of which model, and how.

    Attributes:
        load: HF directory or hub id, Megatron weights, a training checkpoint, or an adapter's folder.
        base: where the base of an adapter is; None: where its files say.
        verify_hashes: compare the files with the digests that were recorded of them.
        family: checked against what ``load`` holds.
        prompt: one question, answered on standard output.
        input: files of records, whose last answer is asked for; the one they have is kept as ``reference``.
        format: of ``input``, as of ``data build``.
        image_root: folder that relative image paths of ``input`` start from.
        out: JSON lines {key, prompt, answer, reference}; None: standard output.
        limit: most records.
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
    prompt: Prompt | None = None
    input: tuple[PathText, ...] = ()
    format: str = "llava"
    image_root: PathText = "."
    out: Path | None = None
    limit: int | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["cpu", "cuda"] | None = None
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.prompt is None) == (not self.input):
            given = "--prompt and --input are both given" if self.input else "nothing is asked"
            raise ConfigError(f"{given}: give one of --prompt (with --image) and --input")
        if self.out is not None and not self.input:
            raise ConfigError("--out goes with --input: the answer to --prompt is printed")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit must be at least 1, got {self.limit}")
        if self.precision == "fp16" and self.device == "cpu":
            raise ConfigError("fp16 does not run on the CPU: use fp32 or bf16 there")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt as the model takes it, and what is written beside its answer."""

    sample: EncodedSample
    record: dict[str, Any]


def run_generate(config: GenerateConfig) -> int:
    """Answers everything; returns the number of answers. Every rank of a job calls it.

    Raises:
        MegatronVLMError: on every rank, with the record or setting that cannot be used.
    """
    with Heartbeat() as heartbeat:
        return _run(config, heartbeat)


def _run(config: GenerateConfig, heartbeat: Heartbeat) -> int:
    device = start_device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    init_process_group(device, config.parallel.distributed_timeout_minutes, heartbeat)
    rank = torch.distributed.get_rank()
    setup_logging(rank)
    with together(device):
        _check_out(config)
        verify = config.verify_hashes and os.environ.get("LOCAL_RANK", "0") == "0"  # of small files: once a machine
        source = open_source(config.load, config.family, config.base, verify_hashes=verify)
        if config.out is not None:
            check_output(config.out, source.folders(), "--out")
    with source:
        with together(device):
            if config.verify_hashes:
                check_records(source.records(), share=rank, shares=torch.distributed.get_world_size())
        text = source.config.text
        topology = build_topology(config.parallel, num_layers=text.num_layers, device=device)
        options = ModelOptions(
            params_dtype=config.precision,
            sequence_parallel=config.parallel.sequence_parallel,
            make_vocab_size_divisible_by=1,
        )
        with together(device):
            processor = source.spec.open_processor(
                source.hf_dir, DataConfig.from_dict({"seq_length": text.longest, **config.data}, "data")
            )
            model = load_model(source, topology, options)
    seed_step(topology, seed=config.sampling.seed, iteration=0)
    questions, number = _questions(config, processor, text.longest), 0
    out: TextIO | None = None
    with together(device):
        if config.out is not None and rank == 0:
            with writing(config.out):
                out = config.out.open("w", encoding="utf-8")
    try:
        while True:
            with together(device):
                batch = list(islice(questions, config.sampling.batch_size * topology.dp))
            if not batch:
                return number
            samples = [question.sample for question in batch]
            answers = answer(model, processor, samples, config.sampling, number)
            number += len(batch)
            with together(device):
                for question, said in zip(batch, answers):
                    if rank == 0:
                        with writing(config.out or "standard output"):
                            _write(question, said, out)
    finally:
        if out is not None:
            out.close()


def _check_out(config: GenerateConfig) -> None:
    """Refuses answers in place of what is asked, or in a model: opening the output would empty what is read after it."""
    if config.out is None:
        return
    check_output(config.out, [folder for folder in (config.load, config.base) if folder is not None], "--out")
    if not config.out.exists():
        return
    read = [
        *config.input,
        *(source.path for source in open_sources(config.format, config.input, root=config.image_root)),
    ]
    for path in read:
        if os.path.exists(path) and os.path.samefile(path, config.out):
            raise ConfigError(
                f"--out {config.out} is the input {path}: the answers would replace it; name another file"
            )


def _questions(config: GenerateConfig, processor: Processor, positions: int) -> Iterator[Question]:
    if config.prompt is not None:
        sample = encode_prompt(processor, config.prompt)
        check_length(sample, positions, config.sampling, "--prompt")
        yield Question(sample=sample, record={})
        return
    for source in open_sources(config.format, config.input, root=config.image_root):
        for number, _, record in islice(read_source(source), config.limit):
            if isinstance(record, DataError):
                raise record
            turns, files = load_record(source, record)
            asked, reference = turns[:-1], turns[-1].text
            images = [decode_image(data, name) for name, data in files]
            file, key = record.file or source.path, record.key or f"record {number}"
            try:
                sample = processor.encode_prompt(asked, images)
            except DataError as error:
                raise DataError(error.message, shard=file, key=key) from error
            check_length(sample, positions, config.sampling, f"{file}, {key}")
            name = record.label or record.key or str(number)
            yield Question(sample=sample, record={"key": name, "prompt": asked[-1].text, "reference": reference})


def _write(question: Question, said: str, out: TextIO | None) -> None:
    if not question.record:
        print(said, flush=True)
        return
    line = json.dumps(question.record | {"answer": said}, ensure_ascii=False)
    print(line, file=out, flush=True)
