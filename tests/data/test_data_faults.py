"""Damaged indexes, odd names and places that cannot be written: a message that names the place, and nothing left behind."""

import contextlib
import json
import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.formats import open_sources
from megatron_vlm.data.shards.build import build_shards
from megatron_vlm.data.shards.dataset import Dataset
from megatron_vlm.data.stream.counts import TokenCounts
from megatron_vlm.errors import ConfigError, DataError, MegatronVLMError
from tests.data.formats.make import built, picture, records_of, write_json, write_pictures, write_tar

TALK = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A dot."}]
PLAIN = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path / "images", 3)
    records = [{"id": i, "image": f"{i}.png", "conversations": TALK} for i in range(3)]
    built(tmp_path / "out", "llava", write_json(tmp_path / "a.json", records), root=str(tmp_path / "images"))
    return tmp_path / "out"


def read(folder):
    dataset = Dataset([folder])
    try:
        return [dataset.read(i) for i in range(len(dataset))]
    finally:
        dataset.close()


@pytest.mark.parametrize("suffix", [".samples.npy", ".images.npy"])
def test_every_byte_of_an_index_header(folder, suffix):
    whole, path = read(folder), folder / f"shard-000000{suffix}"
    data = path.read_bytes()
    draw, found = np.random.default_rng(0), 0
    for at in range(128):
        for value in (data[at] ^ 1, 0, int(draw.integers(256)), ord("("), ord("9")):
            path.write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
            try:
                assert read(folder) == whole
            except DataError as error:
                assert path.name in str(error)
                found += 1
    assert found > 300
    for data in (b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00" + b"\xff" * 60, os.urandom(500)):
        path.write_bytes(data)
        with pytest.raises(DataError, match=path.name):
            read(folder)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="it is a pipe"):
        read(folder)


MANIFESTS = ([], {"version": 2, "shards": [3]}, {"version": 2, "shards": [{"name": "a\0b"}]}, {"version": [2]},
             {"version": 2, "shards": {"a": 1}}, {"version": 2, "shards": [], "layouts": [{"kind": 3, "x": 1}]})  # fmt: skip


def test_damaged_manifests(folder):
    path = folder / "manifest.json"
    good = json.loads(path.read_text())

    def refused(text, words="manifest.json"):
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            read(folder)

    for value in MANIFESTS:
        refused(json.dumps(value))
    for key, value in (("samples", -1), ("samples", 10**30), ("bytes", -5), ("samples", "x"), ("name", "../x"), ("name", 3),
                       ("index", 3), ("images", 1e300), ("name", "a\0b"), ("tar", ["x"])):  # fmt: skip
        changed = json.loads(json.dumps(good))
        changed["shards"][0][key] = value
        refused(json.dumps(changed), "manifest|shard|missing|index")
    for text in (
        "",
        "[" * 100_000,
        '{"version": 2, "version": 2',
        "\ud83d".encode("utf-8", "surrogatepass").decode("latin-1"),
    ):
        refused(text)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"no manifest.json"):
        read(folder)


def test_flipped_bytes_of_token_counts_are_counted_again(folder, make_processor):
    processor = make_processor(DataConfig(seq_length=256))
    dataset = Dataset([folder])
    good = TokenCounts(dataset, processor)(np.arange(3))
    (path,) = folder.glob("*.tokens.npy")
    data = path.read_bytes()
    for at in range(0, len(data), 3):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        assert (TokenCounts(Dataset([folder]), processor)(np.arange(3)) == good).all(), at
    assert path.read_bytes() == data
    dataset.close()


def test_a_file_in_place_of_a_folder_of_shards(tmp_path):
    for name, format in (("x.json", "llava"), ("x.tar", "webdataset"), ("x.parquet", "parquet")):
        (tmp_path / name).write_text("[]")
        with pytest.raises(
            DataError, match=rf"build one first with `megatron-vlm data build --format {format}.*--input .*{name}"
        ):
            Dataset([tmp_path / name])
    for name in (str(tmp_path / "none"), "x" * 5000, "a\0b", "\udcff"):
        with pytest.raises(DataError, match="no such folder"):
            Dataset([name])


# --- odd names and texts ---------------------------------------------------------------------------------------------
HALF = "\ud83d"


@pytest.mark.parametrize(
    "record, words",
    [
        ({"id": HALF, "conversations": PLAIN}, "'id' has half a character"),
        ({"image": f"{HALF}.png", "conversations": TALK}, "a path has half a character"),
        ({"conversations": [PLAIN[0], {"from": "gpt", "value": HALF}]}, "turn 1 has half a character"),
        ({"system": HALF, "conversations": PLAIN}, "turn 0 has half a character"),
        ({"history": [[HALF, "x"]], "conversations": PLAIN}, "turn 0 has half a character"),
    ],
)
def test_half_characters_in_records(tmp_path, record, words):
    (found,) = records_of("llava", write_json(tmp_path / "a.jsonl", [record]))
    assert isinstance(found, DataError) and words in str(found)
    str(found).encode()


def test_file_names_that_are_no_text(tmp_path, capsys):
    name = os.fsdecode(b"\xff\xfe")
    try:
        write_json(tmp_path / f"{name}.jsonl", [{"conversations": PLAIN}])
        write_tar(tmp_path / f"{name}.tar", [("a.txt", b"x")])
    except OSError:
        pytest.fail("this file system has no such names")
    for format, suffix in (("llava", "jsonl"), ("webdataset", "tar")):
        out = tmp_path / f"{format}{name}"
        words = ["data", "build", "--format", format, "--input", str(tmp_path / f"{name}.{suffix}"), "--out", str(out)]
        assert main(words) == 0 and len(read(out)) == 1
        assert main(["data", "check", str(out)]) == 0
        assert main(["data", "check", words[5], "--format", format]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", HALF, os.fsdecode(b"\xff")])
def test_names_that_cannot_be(tmp_path, name, capsys):
    good = str(write_json(tmp_path / "a.jsonl", [{"conversations": PLAIN}]))
    commands = [["check", name], ["check", "--format", "llava", f"{name}*.json"]]
    for format in ("llava", "internvl", "xcomposer", "openai", "parquet", "webdataset"):
        commands.append(["build", "--format", format, "--input", name, "--out", str(tmp_path / "out")])
        commands.append(["check", name, "--format", format])
    build = ["build", "--format", "llava", "--input", good]
    commands.append([*build, "--image-root", name, "--out", str(tmp_path / "o")])
    commands += [[*build, "--out", str(tmp_path / name)]] if name != "\udcff" else []  # which a folder may be called
    for words in commands:
        assert main(["data", *words]) == 1, words
        said = capsys.readouterr()
        assert "Traceback" not in said.err, (words, said.err[-800:])
    assert {p.name for p in tmp_path.iterdir()} <= {"a.jsonl", "out.rejected.jsonl"}


def test_names_of_videos_that_cannot_be(tmp_path):
    for name in ("x" * 5000, "a\0b"):
        talk = [{"from": "human", "value": "<video>"}, PLAIN[1]]
        path = write_json(tmp_path / "a.jsonl", [{"video": name, "conversations": talk}])
        with pytest.raises(DataError, match="record 0: cannot read video"):
            built(tmp_path / "out", "llava", path, root=str(tmp_path))


def test_names_of_members_in_messages(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("x\xff.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match="not a regular file") as caught:
        built(tmp_path / "out", "webdataset", tmp_path / "a.tar")
    assert "np." not in str(caught.value)


# --- places that cannot be written -----------------------------------------------------------------------------------
@contextlib.contextmanager
def full_disk(size):
    """No file may grow beyond ``size`` bytes: what a full disk looks like from inside."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def records(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(20):
        (tmp_path / "images" / f"{i}.png").write_bytes(picture(i, size=(300 + i, 200)) + os.urandom(3000))
    value = [{"id": i, "image": f"{i}.png", "conversations": TALK} for i in range(20)]
    write_json(tmp_path / "a.json", value)
    write_tar(tmp_path / "a.tar", [m for i in range(400) for m in ((f"{i}.png", picture(i % 6)), (f"{i}.txt", b"x"))])
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("format", ["llava", "webdataset"])
def test_a_full_disk_in_a_build(records, format, workers):
    sources = open_sources(
        format, [records / ("a.json" if format == "llava" else "a.tar")], root=str(records / "images")
    )
    before = sorted(p.name for p in records.iterdir())
    with full_disk(4000), pytest.raises(ConfigError, match=rf"cannot write {records}/out: File too large.*: make room"):
        build_shards(sources, records / "out", samples_per_shard=5, num_workers=workers)
    assert sorted(p.name for p in records.iterdir()) == before
    build_shards(sources, records / "out", samples_per_shard=5)
    assert len(read(records / "out")) == {"llava": 20, "webdataset": 400}[format]


def test_places_that_cannot_be_written(records, capsys):
    (records / "file").write_text("x")
    build = [
        "data",
        "build",
        "--format",
        "llava",
        "--input",
        str(records / "a.json"),
        "--image-root",
        str(records / "images"),
    ]
    before = sorted(p.name for p in records.iterdir())
    places = {
        records / "file": "exists and is not an empty folder",
        records / "file" / "x": "cannot write .*Not a dir",
        Path("/proc/x"): "cannot write /proc/x",
        Path("/dev/null/x"): "cannot write",
    }
    for out, words in places.items():
        assert main([*build, "--out", str(out)]) == 1
        said = capsys.readouterr().err
        assert re.search(words, said) and "Traceback" not in said, said
    assert sorted(p.name for p in records.iterdir()) == before


def test_pages_and_pictures_that_cannot_be_written(folder, idefics2_dir, capsys):
    for command in ("preview", "stats"):
        words = ["data", command, str(folder), "--model", str(idefics2_dir), "--seq-length", "256", "--out"]
        assert main([*words, str(folder.parent / "page")]) == 0
        for out in ("/dev/full/x", str(folder), "/proc/none", str(folder.parent / ("x" * 300))):
            assert main([*words, out]) == 1
        with full_disk(100):
            assert main([*words, str(folder.parent / "other")]) == 1
        said = capsys.readouterr().err
        assert "Traceback" not in said and "cannot write" in said and f"{folder.parent}/other" in said
        assert sorted(p.name for p in folder.parent.iterdir()) == ["a.json", "images", "out", "page"]


def test_a_killed_process_of_a_build_is_said(records, monkeypatch):
    import megatron_vlm.data.shards.build as build

    monkeypatch.setattr(build, "make_shard", _die)
    with pytest.raises(MegatronVLMError, match="a process of the build was ended"):
        sources = open_sources("llava", [records / "a.json"], root=str(records / "images"))
        build_shards(sources, records / "out", samples_per_shard=5, num_workers=2)
    assert not (records / "out").exists() and not list(records.glob(".out*"))


def _die(job):
    os._exit(9)
