"""What the trainer's tests run on ranks: whole runs through the command line's own function."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.data.types import IGNORE_INDEX, EncodedSample, PackedRow
from megatron_vlm.errors import MegatronVLMError


def train(argv: list[str]) -> tuple[int, str]:
    """Runs ``megatron-vlm train argv``; returns (exit code, error text with its class in front)."""
    from megatron_vlm.cli.train import run

    try:
        return run(argv), ""
    except MegatronVLMError as error:
        return 1, f"{type(error).__name__}: {error}"


def train_with_signal(argv: list[str], rank: int, metrics: str, lines: int) -> tuple[int, str]:
    """The same; rank ``rank`` alone sends itself SIGTERM once ``metrics`` has that many lines."""

    def watch() -> None:
        while not Path(metrics).exists() or len(Path(metrics).read_text().splitlines()) < lines:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    if int(os.environ["RANK"]) == rank:
        threading.Thread(target=watch, daemon=True).start()
    return train(argv)


def metrics_of(out: Path, evaluations: bool = False) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_second", "step_seconds", "memory_gib")
    return [
        {key: value for key, value in line.items() if key not in clock}
        for line in lines
        if ("eval_loss" in line) == evaluations
    ]


def samples_of(row: PackedRow, tokens_per_image: int) -> list[EncodedSample]:
    """The samples of a row again, as they were before they were laid end to end (without filler)."""
    samples, images = [], list(row.pixels)
    edges = row.cu_seqlens.tolist()
    for key, start, end in zip(row.keys, edges, edges[1:]):
        inside = (row.image_positions >= start) & (row.image_positions < end)
        number = int(inside.sum()) // tokens_per_image
        labels = torch.full((end - start,), IGNORE_INDEX)
        labels[1:] = row.labels[start : end - 1]
        samples.append(
            EncodedSample(
                key=key,
                input_ids=row.input_ids[start:end],
                labels=labels,
                pixels=tuple(images[:number]),
                image_positions=row.image_positions[inside] - start,
            )
        )
        del images[:number]
    return samples
