"""Tiny twins that the checkpoint tests share; a whole tiny checkpoint and real shards for the trainer's tests."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.data.formats.llava import read_llava
from megatron_vlm.data.shards import build_shards
from megatron_vlm.testing.twins import write_tiny_idefics2

SMALL = dict(text_hidden=32, ffn=48, vision_hidden=32, vision_ffn=40, vision_layers=2, depth=1, perceiver_head_dim=8)
TWINS = {
    "mistral": dict(text="mistral", sliding_window=11, **SMALL),
    "tied": dict(text="llama", tie=True, **SMALL),
}
WORDS = "zero one two three four five six seven eight nine".split()  # noqa: SIM905 - reads better


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
    build_shards([(str(path), read_llava(path))], folder / "shards", image_root=images, samples_per_shard=16)
    return folder / "shards"


@pytest.fixture(scope="session")
def twin(tmp_path_factory) -> Path:
    """A whole HF checkpoint."""
    folder = tmp_path_factory.mktemp("twin")
    write_tiny_idefics2(folder, std=0.15, layers=4)
    return folder


@pytest.fixture(scope="session")
def train_data(tmp_path_factory) -> Path:
    """40 samples."""
    return write_shards(tmp_path_factory.mktemp("train"), 40, seed=1)


@pytest.fixture(scope="session")
def valid_data(tmp_path_factory) -> Path:
    """7 samples: uneven over 2 replicas with rows of 2."""
    return write_shards(tmp_path_factory.mktemp("valid"), 7, seed=2)


@pytest.fixture
def command(twin, train_data, tmp_path):
    """``command(out, *more) -> argv`` of a small fp32 run on the CPU that reports to ``tmp_path / out``."""

    def make(out: str, *more: str, load: Path | str = twin) -> list[str]:
        base = (
            f"--load {load} --data-path {train_data} --seq-length 96 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 "
            f"--shortest-edge 24 --num-workers 0 --device cpu --no-tensorboard --log-interval 1 "
            f"--output-dir {tmp_path / out} --make-vocab-size-divisible-by 8"
        )
        return [*base.split(), *(word for text in more for word in text.split())]

    return make


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    """``twins(name)`` -> HF directory, written when first asked for."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp(name))
            write_tiny_idefics2(made[name], **TWINS[name])
        return made[name]

    return make
