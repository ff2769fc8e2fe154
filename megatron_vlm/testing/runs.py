"""Whole training runs for tests: a tiny real data set, the command line's own function on ranks, what a run wrote."""

import json
import os
import random
import shutil
import signal
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_vlm.cli.train import run
from megatron_vlm.data.formats import open_sources
from megatron_vlm.data.row import IGNORE_INDEX, EncodedSample, Row
from megatron_vlm.data.shards.build import build_shards
from megatron_vlm.errors import MegatronVLMError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_shards(folder: Path, count: int, seed: int) -> Path:
    """Shards of ``count`` samples with 0, 1 or 2 images of odd sizes."""
    draw, noise = random.Random(seed), np.random.default_rng(seed)
    images = folder / "images"
    images.mkdir(parents=True)
    records = []
    for number in range(count):
        names = [f"{number}_{i}.png" for i in range(draw.choice([0, 1, 1, 1, 2]))]
        for name in names:
            size = (draw.randint(20, 60), draw.randint(20, 60), 3)
            Image.fromarray(noise.integers(0, 255, size, dtype=np.uint8)).save(images / name)
        answer = " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))
        turns = [("human", "<image>\n" * len(names) + "What is it?"), ("gpt", answer)]
        record = {"id": f"s{number}", "conversations": [{"from": who, "value": text} for who, text in turns]}
        records.append({**record, "image": names} if names else record)
    path = folder / "records.json"
    path.write_text(json.dumps(records))
    build_shards(open_sources("llava", [path], root=str(images)), folder / "shards", samples_per_shard=16)
    return folder / "shards"


def damage_one_image(data: Path, copy: Path) -> Path:
    """Copies a shard folder, overwrites bytes of the first image of its second shard and returns that shard."""
    shutil.copytree(data, copy)
    shard = copy / "shard-000001.tar"
    with tarfile.open(shard) as tar:
        image = next(member for member in tar if member.name.endswith(".png"))
    with open(shard, "r+b") as file:
        file.seek(image.offset_data + 60)
        file.write(b"oops")
    return shard


def train(argv: list[str]) -> tuple[int, str]:
    """Runs ``megatron-vlm train argv``; returns (exit code, error text with its class in front)."""
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
    clock = ("tokens_per_second", "step_seconds", "memory_gib", "save_seconds", "save_wait_seconds", "tflops")
    return [
        {key: value for key, value in line.items() if key not in clock}
        for line in lines
        if ("eval_loss" in line) == evaluations
    ]


def samples_of(row: Row, tokens_per_image: int) -> list[EncodedSample]:
    """The samples of a row again, as they were before they were laid end to end (without filler)."""
    samples, images = [], list(row.pixels)
    edges = row.starts
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
