"""What a run writes: metrics.jsonl (a line per step), TensorBoard, and the progress lines of train.log. Rank 0 alone.

output_dir/config.yaml  metrics.jsonl  samples.jsonl  starts.jsonl  train.log  tensorboard/
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import yaml

from megatron_vlm.data.row import IGNORE_INDEX, Row
from megatron_vlm.data.types import Processor
from megatron_vlm.errors import ConfigError
from megatron_vlm.files import write_synced, writing
from megatron_vlm.line_files import LineFile
from megatron_vlm.log import get_logger
from megatron_vlm.progress import Bar
from megatron_vlm.scoring.metrics import Score
from megatron_vlm.training.answering.prompts import Prompt
from megatron_vlm.training.evaluate import EvalResult
from megatron_vlm.training.metrics.config import LoggingConfig
from megatron_vlm.training.metrics.trackers import TRACKERS
from megatron_vlm.training.metrics.writers import SafeWriter
from megatron_vlm.training.step import StepResult

log = get_logger(__name__)

SAMPLES, STARTS = "samples.jsonl", "starts.jsonl"


class Metrics:
    """The files of one run.

    Args:
        output_dir: directory of the run.
        config: logging settings.
        resolved: the whole resolved config, written as config.yaml.
        start: iteration that the run goes on from; lines past it are removed. At 0 an older metrics.jsonl is kept under
            another name.
        total: iterations of the run, for the estimate of the time left.
        evaluation_only: lines are only added, and the config is written as config.eval.yaml.
    """

    def __init__(
        self,
        output_dir: Path,
        config: LoggingConfig,
        resolved: dict[str, Any],
        *,
        start: int,
        total: int,
        evaluation_only: bool = False,
    ):
        self.output_dir, self.config, self.total = output_dir, config, total
        output_dir.mkdir(parents=True, exist_ok=True)
        name = "config.eval.yaml" if evaluation_only else "config.yaml"
        with writing(output_dir / name):
            write_synced(output_dir / name, yaml.safe_dump(resolved, sort_keys=False).encode())
        path = output_dir / "metrics.jsonl"
        if not evaluation_only:
            for old in (path, output_dir / SAMPLES):
                if start:
                    trim(old, start)
                else:
                    keep_old(old)
            if not start:
                keep_old(output_dir / STARTS)
        self.file, self.samples = LineFile(path), LineFile(output_dir / SAMPLES)
        self.writers: list[SafeWriter] = []
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            where = config.tensorboard_dir or output_dir / "tensorboard"
            purge = start + 1 if start and not evaluation_only else None
            self.writers.append(SafeWriter("TensorBoard", lambda: SummaryWriter(str(where), purge_step=purge)))
        for name in config.trackers:
            tracker, resumed = TRACKERS[name], bool(start) or evaluation_only
            make = partial(tracker, output_dir, config.name, resolved, resumed=resumed)
            self.writers.append(SafeWriter(tracker.title, make))
        self.seconds_per_step = 0.0
        self.bar = Bar("training", total, done=start) if not evaluation_only else None

    @classmethod
    def of_run(cls, output_dir: Path, config: LoggingConfig, resolved: dict[str, Any], **settings: Any) -> Self:
        """The same, with the user's error where the folder cannot be written.

        Raises:
            ConfigError: the folder, a file in it or TensorBoard's cannot be written.
        """
        try:
            return cls(output_dir, config, resolved, **settings)
        except OSError as error:
            raise ConfigError(f"the run cannot report to {output_dir}: {error} (logging.output_dir)") from error

    def started(self, facts: Mapping[str, Any]) -> None:
        """Adds a line about this start to ``starts.jsonl``: where it goes on from, and in what."""
        file = LineFile(self.output_dir / STARTS)
        file.add(json.dumps(facts, ensure_ascii=False))
        file.close()

    def step(
        self,
        iteration: int,
        result: StepResult,
        rates: dict[str, float],
        *,
        seconds: float,
        consumed_samples: int,
        **more: Any,
    ) -> None:
        """Records one step; ``seconds`` includes the wait for data, ``more`` is recorded as it is."""
        record = {
            "iteration": iteration,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": rates["llm"],
            "lr_vision": rates["vision"],
            "lr_connector": rates["connector"],
            "tokens": result.tokens,
            "supervised_tokens": result.supervised_tokens,
            "images": result.images,
            "tokens_per_second": result.tokens / seconds,
            "step_seconds": seconds,
            "memory_gib": result.memory_gib,
            "loss_scale": result.loss_scale,
            "skipped": int(result.skipped),
            "holes": result.holes,
            "truncated": result.truncated,
            "consumed_samples": consumed_samples,
            **more,
        }
        self._write(record)
        self.seconds_per_step = seconds if not self.seconds_per_step else 0.9 * self.seconds_per_step + 0.1 * seconds
        if self.bar is not None:
            self.bar.show(iteration, f"loss {result.loss:.4f} | {_rates(record)}")
        if iteration % self.config.log_interval and iteration not in (1, self.total):
            return
        log.info(self._progress(record, result))
        for writer in self.writers:
            for key, value in record.items():
                if key not in ("iteration", "consumed_samples", "sources"):
                    writer.add_scalar(f"train/{key}", value, iteration)

    def evaluation(self, iteration: int, result: EvalResult) -> None:
        """Records one evaluation."""
        self._write({"iteration": iteration, "eval_loss": result.loss})
        log.info(
            f"iteration {iteration}: eval_loss {result.loss:.6f} over {result.samples} samples, "
            f"{result.supervised_tokens} supervised tokens"
        )
        for writer in self.writers:
            writer.add_scalar("eval/loss", result.loss, iteration)

    def scores(self, iteration: int, scores: Mapping[str, Score]) -> None:
        """Records the scores of ``evaluate.file``."""
        self._write({"iteration": iteration, **{f"eval_{name}": score.value for name, score in scores.items()}})
        for name, score in scores.items():
            log.info("iteration %d: eval_%s %s over %d answers", iteration, name, score, score.number)
            for writer in self.writers:
                writer.add_scalar(f"eval/{name}", score.value, iteration)

    def answers(self, iteration: int, prompts: Sequence[Prompt], answers: Sequence[str]) -> None:
        """Records the answers to ``evaluate.prompts``: samples.jsonl, TensorBoard and the log."""
        for number, (prompt, answer) in enumerate(zip(prompts, answers)):
            record = {
                "iteration": iteration,
                "prompt": prompt.text,
                "images": list(prompt.images),
                "answer": answer,
            }
            self.samples.add(json.dumps(record, ensure_ascii=False))
            log.info("iteration %d: %r -> %r", iteration, prompt.text, answer)
            for writer in self.writers:
                writer.add_text(f"samples/{number}", f"**{prompt.text}**\n\n{answer}", iteration)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        for file in (self.file, self.samples):
            file.close()
        for writer in self.writers:
            writer.close()

    def _write(self, record: dict[str, Any]) -> None:
        plain = {
            key: value if not isinstance(value, float) or math.isfinite(value) else None
            for key, value in record.items()
        }
        self.file.add(json.dumps(plain))

    def _progress(self, record: dict[str, Any], result: StepResult) -> str:
        left = time.strftime("%H:%M:%S", time.gmtime(self.seconds_per_step * max(0, self.total - record["iteration"])))
        days = int(self.seconds_per_step * max(0, self.total - record["iteration"]) // 86400)
        notes = "".join(
            f" | {name} {value}" for name, value in (("holes", result.holes), ("truncated", result.truncated)) if value
        )
        if result.skipped:
            notes += f" | SKIPPED, gradients overflowed at loss scale {result.loss_scale:g}"
        return (
            f"iteration {record['iteration']}/{self.total} | loss {result.loss:.6f} | lr {record['lr']:.3e} | "
            f"grad norm {result.grad_norm:.4f} | {_rates(record)} | {record['step_seconds']:.3f} s/step | "
            f"ETA {f'{days}d ' if days else ''}{left}{notes}"
        )


def progress_line(iteration: int, total: int, result: StepResult, lr: float, seconds: float) -> str:
    """A step in one line, for the first rank of a node that writes no files."""
    return (
        f"iteration {iteration}/{total} | loss {result.loss:.6f} | lr {lr:.3e} | grad norm {result.grad_norm:.4f} | "
        f"{result.tokens / seconds:.0f} tokens/s | {seconds:.3f} s/step"
    )


def _rates(record: Mapping[str, Any]) -> str:
    """Real tokens and images a second over all ranks, and the largest rank's peak memory."""
    images = record["images"] / record["step_seconds"]
    return f"{record['tokens_per_second']:.0f} tokens/s | {images:.1f} images/s | {record['memory_gib']:.2f} GiB"


def trim(path: Path, iteration: int) -> None:
    """Removes lines past ``iteration``, and a last line that a killed run left incomplete."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    write_synced(path, "".join(kept).encode())


def keep_old(path: Path) -> None:
    """Moves a file of an earlier run in the same directory aside."""
    if not path.exists() or not path.stat().st_size:
        return
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}.jsonl")).exists():
        number += 1
    path.replace(aside)
    log.warning(f"{path} is of an earlier run: kept as {aside.name}")


def show_sample(row: Row, processor: Processor) -> str:
    """The first sample of a row as text: supervised parts in ``[[ ]]``, runs of image tokens as ``<image> x n``."""
    end = row.starts[1]
    ids = row.input_ids[:end].tolist()
    supervised = [False] + (row.labels[: end - 1] != IGNORE_INDEX).tolist()  # labels[t] is the token at t + 1
    parts: list[str] = []
    for (learned, image), run in groupby(zip(ids, supervised), lambda item: (item[1], item[0] in processor.image_ids)):
        tokens = [token for token, _ in run]
        text = processor.tokenizer.decode(tokens[:1] if image else tokens)
        text += f" x {len(tokens)} " if image else ""
        parts.append(f"[[{text}]]" if learned else text)
    key = row.keys[0] if row.keys else "no sample"
    return f"{key} ({end} tokens, {sum(supervised)} supervised): {''.join(parts)}"
