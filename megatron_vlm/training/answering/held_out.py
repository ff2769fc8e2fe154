"""``megatron-vlm evaluate``: a held-out file answered and scored; and the same while a run trains.

questions --Job.answers--> answers.jsonl --METRICS--> scores.json, a table, mistakes.html
      +-- blind, majority: what is reached without seeing, or without a model
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vlm.data.formats.records import VideoSettings
from megatron_vlm.errors import ConfigError
from megatron_vlm.files import read_json, write_json, write_synced, writing
from megatron_vlm.line_files import json_lines
from megatron_vlm.log import get_logger
from megatron_vlm.parallel.batch import together
from megatron_vlm.parallel.heartbeat import Heartbeat
from megatron_vlm.scoring.metrics import METRICS, Score, check_metrics, summary
from megatron_vlm.training.answering.job import AskConfig, Job, open_job
from megatron_vlm.training.answering.mistakes import mistakes_page
from megatron_vlm.training.answering.questions import Question, questions
from megatron_vlm.training.checkpoint.together import from_rank_0

log = get_logger(__name__)

SETTINGS, SCORES, PAGE = "evaluate.json", "scores.json", "mistakes.html"


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(AskConfig):
    """What is asked and how it is scored.

    Attributes:
        out: folder of answers.jsonl, scores.json and mistakes.html; one that holds answers to the same is completed.
        metrics: see ``scoring.metrics``; by the first one answers are mistakes or not.
        subset_key: key of a record whose value is its subset; None: the file's name, where there are several.
        baselines: ``blind``: the same model without the images; ``majority``: the most common right answer, to every question.
        mistakes: most of them on the page.
    """

    out: Path
    metrics: tuple[str, ...] = ("exact_match",)
    subset_key: str | None = None
    baselines: tuple[Literal["blind", "majority"], ...] = ()
    mistakes: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        check_metrics(self.metrics)
        if not self.input:
            raise ConfigError("nothing is asked: name held-out files (--input)")
        if self.mistakes < 0:
            raise ConfigError(f"--mistakes must not be negative, got {self.mistakes}")


def run_evaluate(config: ScoreConfig) -> dict[str, Any]:
    """Answers, scores and writes; returns what scores.json holds, the same on every rank of the job.

    Raises:
        MegatronVLMError: on every rank, with the record or setting that cannot be used.
    """
    with Heartbeat() as heartbeat, open_job(config, heartbeat, [("--out", config.out)]) as job:
        with together(job.model.device):
            asked = list(questions(config.format, config.input, config.image_root, config.limit, config.subset_key))
            if not asked:
                raise ConfigError(f"--input {', '.join(config.input)}: there is no record")
            if job.first:
                _open_out(config, job)
        said = {"model": _answers(config, job, asked, blind=False)}
        if "blind" in config.baselines:
            said["blind"] = _answers(config, job, asked, blind=True)
        if "majority" in config.baselines:
            said["majority"] = [majority(asked)] * len(asked)
        scores = {who: score(asked, texts, config.metrics) for who, texts in said.items()}
        with together(job.model.device):
            found = _report(config, asked, said["model"], scores, job.processor.video, write=job.first)
    return found


def score(asked: Sequence[Question], texts: Sequence[str], metrics: Sequence[str]) -> dict[str, dict[str, Score]]:
    """Scores of answers: {subset: {metric: Score}}; ``all`` is all of them."""
    groups: dict[str, list[int]] = {"all": list(range(len(asked)))}
    for place, question in enumerate(asked):
        if question.subset:
            groups.setdefault(question.subset, []).append(place)
    values = {name: [METRICS[name](text, q.references) for q, text in zip(asked, texts)] for name in metrics}
    return {
        subset: {name: summary([values[name][i] for i in places]) for name in metrics}
        for subset, places in groups.items()
    }


def majority(asked: Sequence[Question]) -> str:
    """The most common right answer; of several the one that comes first."""
    return Counter(text for question in asked for text in question.references).most_common(1)[0][0]


def _open_out(config: ScoreConfig, job: Job) -> None:
    """Makes the folder, or sees that it holds answers to the same questions by the same model."""
    names = ("input", "format", "image_root", "limit", "precision", "data", "sampling")
    whole = config.to_dict()
    settings = {"model": list(map(str, job.folders)), **{name: whole[name] for name in names}}
    del settings["sampling"]["batch_size"]  # changes no answer
    path = config.out / SETTINGS
    if path.exists():
        before = read_json(path)
        apart = [name for name in settings if before.get(name) != settings[name]]
        if apart:
            name = apart[0]
            raise ConfigError(
                f"--out {config.out} holds answers of another {name} ({before.get(name)}, now {settings[name]}): name "
                "another folder"
            )
        return
    with writing(config.out):
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)


def _answers(config: ScoreConfig, job: Job, asked: Sequence[Question], *, blind: bool) -> list[str]:
    """Answers to all questions, those of an earlier run taken from its file. A collective of the job."""
    device, path = job.model.device, config.out / ("blind.jsonl" if blind else "answers.jsonl")
    texts: list[str] = []
    with together(device):
        if job.first:
            texts = _kept(path, asked)
    texts = from_rank_0(texts)
    if texts and job.first:
        log.info("%s: %d of %d answers are there", path, len(texts), len(asked))
    for batch in job.ask(asked[len(texts) :], len(texts), blind=blind):
        texts += [text for _, text in batch]
        with together(device):
            if job.first:
                with writing(path), path.open("a", encoding="utf-8") as file:
                    file.writelines(_line(question, text) for question, text in batch)
    return texts


def _line(question: Question, answer: str) -> str:
    asked = {"number": question.number, "key": question.name, "asked": question.digest, "prompt": question.text}
    return json.dumps(asked | {"references": question.references, "answer": answer}, ensure_ascii=False) + "\n"


def _kept(path: Path, asked: Sequence[Question]) -> list[str]:
    """Answers of an earlier run up to where it broke off, or where something else is asked; the file is cut there."""
    kept: list[str] = []
    for question, line in zip(asked, json_lines(path)):
        answer = line.get("answer")
        if not isinstance(answer, str) or line != json.loads(_line(question, answer)):
            break
        kept.append(answer)
    if path.exists():
        if others := len(path.read_bytes().splitlines()) - len(kept):
            log.warning("%s: %d answers are to other questions, or were cut off: they are given again", path, others)
        write_synced(path, "".join(map(_line, asked, kept)).encode())
    return kept


def _report(
    config: ScoreConfig,
    asked: Sequence[Question],
    texts: Sequence[str],
    scores: Mapping[str, Mapping[str, Mapping[str, Score]]],
    video: VideoSettings,
    *,
    write: bool,
) -> dict[str, Any]:
    rows = [
        [subset, str(scores["model"][subset][config.metrics[0]].number), who]
        + [str(scores[who][subset][metric]) for metric in config.metrics]
        for subset in scores["model"]
        for who in scores
    ]
    head = ["subset", "answers", "of", *config.metrics]
    found = {
        "model": config.load,
        "input": list(config.input),
        "scores": {
            who: {subset: {metric: asdict(s) for metric, s in by.items()} for subset, by in subsets.items()}
            for who, subsets in scores.items()
        },
    }
    if write:
        with writing(config.out):
            write_json(config.out / SCORES, found)
            html = mistakes_page(
                config.load, asked, texts, config.metrics, head, rows, most=config.mistakes, video=video
            )
            write_synced(config.out / PAGE, html.encode())
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        for row in [head, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip(), flush=True)
        print(f"mistakes: {config.out / PAGE}", flush=True)
    return found
