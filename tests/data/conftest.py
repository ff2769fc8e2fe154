"""Real tiny data for the tests of the data system: digits scans as PNG files, a LLaVA json, an Idefics2 folder."""

import functools
import json
import os
import tempfile

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from megatron_vlm.data.formats import open_sources
from megatron_vlm.data.shards.build import build_shards
from megatron_vlm.models.families.idefics2.processor import Idefics2Processor
from megatron_vlm.testing.twins.idefics2 import tiny_idefics2_config, tiny_tokenizer

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_digits(folder, number):
    """Writes scans, each seventh record text only and each fifth with two images, and returns the json file."""
    digits = load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(number):
        scan = (digits.images[i] * 15).astype(np.uint8)
        Image.fromarray(scan).resize((20 + i % 9, 20 + i % 4)).save(folder / f"{i}.png")
        name = NAMES[digits.target[i]]
        turns = [("human", "<image>\nWhat digit is this?"), ("gpt", name)]
        images = f"{i}.png"
        if i % 7 == 3:
            turns, images = [("human", "Count to " + name), ("GPT", "zero " * (i % 11 + 1) + name)], None
        elif i % 5 == 2:
            turns = [("human", "<image><image> Are they one?"), ("gpt", "no"), ("human", "Which?"), ("gpt", name)]
            images = [f"{i}.png", f"{i - 1}.png"]
        record = {"id": f"digit-{i}", "conversations": [{"from": f, "value": v} for f, v in turns]}
        records.append(record if images is None else {**record, "image": images})
    path = folder / "digits.json"
    path.write_text(json.dumps(records, indent=1))
    return path


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """97 samples in 5 shards; read only."""
    folder = tmp_path_factory.mktemp("digits")
    path = write_digits(folder / "images", 97)
    sources = open_sources("llava", [path], root=str(folder / "images"))
    build_shards(sources, folder / "shards", samples_per_shard=20)
    return folder / "shards"


@pytest.fixture(scope="session")
def memory_dir():
    """A folder on a file system in memory where there is one; else the usual one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


@pytest.fixture(scope="session")
def make_digits():
    """The function that writes scans and a LLaVA json: ``make_digits(folder, number) -> json path``."""
    return write_digits


@pytest.fixture(scope="session")
def idefics2_dir(tmp_path_factory):
    """What an Idefics2 processor is read from, without weights: images of 28 to 56 pixels, 5 tokens each."""
    folder = tmp_path_factory.mktemp("idefics2")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_idefics2_config(tokenizer).save_pretrained(folder)
    images = {"size": {"longest_edge": 56, "shortest_edge": 28}}
    (folder / "processor_config.json").write_text(json.dumps({"image_seq_len": 5, "image_processor": images}))
    return folder


@pytest.fixture(scope="session")
def make_processor(idefics2_dir):
    """``make_processor(config) -> processor``."""
    return functools.cache(lambda config: Idefics2Processor.from_pretrained(idefics2_dir, config))
