"""Malformed inputs: each is read right or reported by name; nothing crashes, hangs, swells or escapes."""

import os
import re
import resource
import tempfile
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_vlm.data.formats import open_sources
from megatron_vlm.data.images.pictures import decode_image
from megatron_vlm.data.shards.build import build_shards
from megatron_vlm.data.shards.dataset import Dataset
from megatron_vlm.errors import DataError, MegatronVLMError
from tests.data.corpus import CASES, OK, PNG, said, talk

MEMORY = 500 * 2**20


@pytest.fixture
def tmp_path(memory_dir):
    """A folder in memory: builds sync every file they finish, and a disk takes its time over that."""
    with tempfile.TemporaryDirectory(dir=memory_dir) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the cases point at; in a folder of their own, so that an escape would be seen."""
    folder = tmp_path_factory.mktemp("malformed")
    inputs = folder / "in"
    (inputs / "empty").mkdir(parents=True)
    (folder / "outside").mkdir()
    (folder / "outside" / "o.png").write_bytes(PNG)
    (inputs / "good.png").write_bytes(PNG)
    (inputs / "text.mp4").write_bytes(b"hello")
    (inputs / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{folder}/outside/o.png\n#EXT-X-ENDLIST\n")
    os.mkfifo(inputs / "pipe")
    return folder


def tree(folder):
    return {str(p): p.lstat().st_mtime_ns for p in folder.rglob("*") if "/out" not in str(p) or "/outside" in str(p)}


def read_all(folder, out, name, data):
    """Builds ``out`` from the case and reads every sample back, images decoded; returns their number."""
    inputs = folder / "in"
    (inputs / name).write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    format, path = ("webdataset" if name.endswith(".tar") else "llava"), inputs / name
    if name == "a.png":
        path = inputs / "image.jsonl"
        path.write_text(talk(image=name))
    build_shards(open_sources(format, [path], root=str(inputs)), out)
    dataset = Dataset([out])
    try:
        for number in range(len(dataset)):
            sample = dataset.read(number)
            for image in sample.images:
                assert decode_image(image).mode == "RGB"
        return len(dataset)
    finally:
        dataset.close()


def test_the_corpus_is_large_and_its_names_differ():
    assert len({name for name, *_ in CASES}) == len(CASES) >= 150


@pytest.mark.parametrize("case", CASES, ids=[name for name, *_ in CASES])
def test_each_is_read_right_or_reported_by_name(case, place, tmp_path, monkeypatch):
    _, file, data, bar = case
    monkeypatch.chdir(tmp_path)
    # Data of this process now, and 500 MB: a case that takes more gets a MemoryError.
    limits, now = resource.getrlimit(resource.RLIMIT_DATA), psutil.Process().memory_info().data
    resource.setrlimit(resource.RLIMIT_DATA, (now + MEMORY, limits[1]))
    try:
        (place / "in" / file).unlink(missing_ok=True)
        before = tree(place)
        try:
            assert read_all(place, tmp_path / "out", file, data) >= 1
            text = OK
        except MegatronVLMError as error:
            text = str(error)
            assert isinstance(error, DataError) and file in text, f"no name in: {text}"
            assert {p.name for p in tmp_path.iterdir()} <= {"out.rejected.jsonl"}
        assert re.search(bar, text, re.DOTALL), f"{text[:500]!r} lacks {bar!r}"
        after = tree(place)
        mine = {str(place / "in"), str(place / "in" / file), str(place / "in" / "image.jsonl")}
        assert {p for p in before | after if before.get(p) != after.get(p)} <= mine
        assert {p.name for p in tmp_path.iterdir()} <= {"out", "out.rejected.jsonl"}
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        (place / "in" / file).unlink(missing_ok=True)


# --- our own shards --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", [".tar", ".samples.npy", ".images.npy"])
@pytest.mark.parametrize("seed", range(4))
def test_random_damage_of_a_shard_is_named(place, tmp_path, suffix, seed):
    """Bytes changed anywhere: each sample reads as it was written, or is reported."""
    lines = [talk(id=i, conversations=said(f"<image> {i}", "yes")) for i in range(6)]
    (place / "in" / "s.jsonl").write_text("\n".join(lines))
    build_shards(open_sources("llava", [place / "in" / "s.jsonl"], root=str(place / "in")), tmp_path / "out")
    whole = [Dataset([tmp_path / "out"]).read(i) for i in range(6)]
    path = tmp_path / "out" / f"shard-000000{suffix}"
    data = bytearray(path.read_bytes())
    draw = np.random.default_rng(seed)
    first = 0 if suffix == ".tar" else 128  # the header of an array is checked as one
    for at in draw.integers(first, len(data), 3):
        data[at] ^= int(draw.integers(1, 256))
    path.write_bytes(data)
    for number in range(6):
        try:
            sample = Dataset([tmp_path / "out"]).read(number)
        except DataError as error:
            assert "shard-000000" in str(error)
        else:
            same = (sample.turns, sample.key) == (whole[number].turns, whole[number].key)
            assert same and sample.images == whole[number].images
