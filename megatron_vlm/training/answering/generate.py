"""``megatron-vlm generate``: questions to a checkpoint of any kind, in any layout.

--load (HF, Megatron weights, training checkpoint) --open_job--> Job --answers--> standard output | JSON lines
--prompt, --image | --input records -----------------------------^
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from megatron_vlm.errors import ConfigError
from megatron_vlm.files import writing
from megatron_vlm.parallel.batch import together
from megatron_vlm.parallel.heartbeat import Heartbeat
from megatron_vlm.training.answering.answers import check_length
from megatron_vlm.training.answering.job import AskConfig, Job, open_job
from megatron_vlm.training.answering.prompts import Prompt, encode_prompt
from megatron_vlm.training.answering.questions import Question, questions


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(AskConfig):
    """What is asked, and where the answers go.

    Attributes:
        prompt: one question, answered on standard output.
        out: JSON lines {key, prompt, answer, reference}; None: standard output.
    """

    prompt: Prompt | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (not self.input):
            given = "--prompt and --input are both given" if self.input else "nothing is asked"
            raise ConfigError(f"{given}: give one of --prompt (with --image) and --input")
        if self.out is not None and not self.input:
            raise ConfigError("--out goes with --input: the answer to --prompt is printed")
        super().__post_init__()


def run_generate(config: GenerateConfig) -> int:
    """Answers everything; returns the number of answers. Every rank of a job calls it.

    Raises:
        MegatronVLMError: on every rank, with the record or setting that cannot be used.
    """
    outputs = [("--out", config.out)] if config.out is not None else []
    with Heartbeat() as heartbeat, open_job(config, heartbeat, outputs) as job:
        return _run(config, job)


def _run(config: GenerateConfig, job: Job) -> int:
    device, number = job.model.device, 0
    out: TextIO | None = None
    with together(device):
        if config.out is not None and job.first:
            with writing(config.out):
                out = config.out.open("w", encoding="utf-8")
    try:
        for batch in _answers(config, job):
            number += len(batch)
            with together(device):
                for question, said in batch:
                    if job.first:
                        with writing(config.out or "standard output"):
                            print(said if question is None else _line(question, said), file=out, flush=True)
        return number
    finally:
        if out is not None:
            out.close()


def _answers(config: GenerateConfig, job: Job) -> Iterator[Sequence[tuple[Question | None, str]]]:
    if config.prompt is None:
        yield from job.ask(questions(config.format, config.input, config.image_root, config.limit))
        return
    with together(job.model.device):
        sample = encode_prompt(job.processor, config.prompt)
        check_length(sample, job.positions, config.sampling, "--prompt")
    yield from job.answers(iter([(None, sample)]))


def _line(question: Question, said: str) -> str:
    record = {"key": question.name, "prompt": question.text, "reference": question.record.turns[-1].text}
    return json.dumps(record | {"answer": said}, ensure_ascii=False)
