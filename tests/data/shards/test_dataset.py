"""Shards: any webdataset reader opens them, the same input gives the same bytes, damage is named."""

import io
import json
import os
import tarfile
import zlib

import numpy as np
import pytest
import webdataset
from PIL import Image

from megatron_vlm.data.formats import open_sources
from megatron_vlm.data.shards.build import build_shards
from megatron_vlm.data.shards.dataset import Dataset
from megatron_vlm.data.shards.tar import parse_members
from megatron_vlm.data.shards.writer import SAMPLE_DTYPE
from megatron_vlm.data.view.check import check_folder
from megatron_vlm.errors import ConfigError, DataError


def build(path, out, **options):
    return build_shards(open_sources("llava", [path], root=str(path.parent)), out, **options)


@pytest.fixture
def small(tmp_path, make_digits):
    """A folder of 12 samples in 3 shards that a test may damage."""
    path = make_digits(tmp_path / "in", 12)
    build(path, tmp_path / "out", samples_per_shard=5)
    return tmp_path / "out"


def test_same_records_give_same_bytes_wherever_they_lie(tmp_path, make_digits):
    folders = []
    for name in ("a", "b/c"):
        path = make_digits(tmp_path / name, 12)
        os.utime(path.parent / "0.png", (1, 1))
        build(path, tmp_path / name / "out", samples_per_shard=5)
        folders.append(tmp_path / name / "out")
    names = sorted(p.name for p in folders[0].iterdir())
    assert names == sorted(p.name for p in folders[1].iterdir()) and "shard-000002.tar" in names
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_webdataset_reads_them(small):
    urls = sorted(map(str, small.glob("*.tar")))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [s["__key__"] for s in samples] == [f"digits-{i:09d}" for i in range(12)]
    assert json.loads(samples[2]["json"])["id"] == "digit-2"
    assert samples[2]["0.png"] == (small.parent / "in" / "2.png").read_bytes()  # the original bytes
    # Its second image is the one of the sample before: stored once, and named.
    assert "1.png" not in samples[2] and json.loads(samples[2]["json"])["members"][1] == "digits-000000001.0.png"
    assert samples[1]["0.png"] == (small.parent / "in" / "1.png").read_bytes()


def test_index_and_manifest(small):
    manifest = json.loads((small / "manifest.json").read_text())
    assert manifest["samples"] == 12 and [s["samples"] for s in manifest["shards"]] == [5, 5, 2]
    for shard in manifest["shards"]:
        data = (small / shard["name"]).read_bytes()
        table = np.load((small / shard["name"]).with_suffix(".samples.npy"))
        assert table.dtype == SAMPLE_DTYPE and len(data) == shard["bytes"]
        with tarfile.open(small / shard["name"]) as tar:
            starts = [m.offset for m in tar.getmembers() if m.name.endswith(".json")]
        assert table["offset"].tolist() == starts
        for entry in table:
            block = data[entry["offset"] : entry["offset"] + entry["span"]]
            assert zlib.crc32(block) == entry["crc32"]
            members = list(parse_members(block))
            first = entry["first_image"]
            images = np.load((small / shard["name"]).with_suffix(".images.npy"))[first : first + entry["num_images"]]
            for image in images:
                content = data[image["offset"] : image["offset"] + image["size"]]
                assert zlib.crc32(content) == image["crc32"]
                assert Image.open(io.BytesIO(content)).size == (image["width"], image["height"])
            own = [image for image in images if image["offset"] > entry["offset"]]
            assert len(members) == 1 + len(own)


def test_dataset_reads_every_sample(small):
    for sample in map(Dataset([small]).read, range(12)):
        assert sample.images == tuple((small.parent / "in" / name).read_bytes() for name in sample.image_names)
    dataset = Dataset([small, small])
    assert len(dataset) == 24
    sample = dataset.read(12 + 7)
    assert sample.key == "digits-000000007" and sample.turns[3].text == "seven"
    assert sample.image_names == ("7.png", "6.png")
    assert dataset.image_sizes(1)[dataset.index(1)[2]["first_image"]].tolist() == [27, 23]
    text = dataset.read_text(1, 2)
    assert (text.key, text.turns, text.image_names) == (sample.key, sample.turns, sample.image_names)
    assert dataset.locate(np.array([0, 4, 5, 11, 12, 23]))[0].tolist() == [0, 0, 1, 2, 3, 5]
    dataset.close()


def test_long_text_is_read_whole(tmp_path):
    path = tmp_path / "long.jsonl"
    turns = [{"from": "human", "value": "word " * 5000}, {"from": "gpt", "value": "é" * 5000}]
    path.write_text(json.dumps({"conversations": turns}))
    build(path, tmp_path / "out")
    dataset = Dataset([tmp_path / "out"])
    assert dataset.read_text(0, 0).turns == dataset.read(0).turns
    assert dataset.read(0).turns[1].text == "é" * 5000


def test_two_sources_of_one_name_keep_apart(tmp_path, make_digits):
    paths = [make_digits(tmp_path / name, 3) for name in ("a", "b")]
    build_shards(open_sources("llava", paths, root=str(paths[0].parent)), tmp_path / "out")
    keys = [Dataset([tmp_path / "out"]).read(i).key for i in range(6)]
    assert len(set(keys)) == 6 and keys[3] == "digits-1-000000000"


def test_failed_build_leaves_nothing(tmp_path, make_digits):
    path = make_digits(tmp_path / "in", 12)
    (path.parent / "9.png").unlink()
    with pytest.raises(DataError, match=r"record 9.*9\.png: No such file"):
        build(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out.rejected.jsonl"]


def test_full_folder_is_not_overwritten(small):
    with pytest.raises(ConfigError, match="is not an empty folder"):
        build(small.parent / "in" / "digits.json", small)


def test_no_records(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(DataError, match=r"no records in .*a\.json"):
        build(tmp_path / "a.json", tmp_path / "out")


def damage(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(data):
    data[700] ^= 1


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("shard-000001.tar", flip, "crc32"),
        ("shard-000001.tar", lambda data: data.__delitem__(slice(2000, None)), "manifest says"),
        ("shard-000001.samples.npy", lambda data: data.__delitem__(slice(150, None)), "index"),
        ("shard-000001.samples.npy", lambda data: data.clear(), "index"),
        ("manifest.json", lambda data: data.__setitem__(0, 0), "manifest"),
    ],
)
def test_damage_is_named(small, name, change, message):
    damage(small / name, change)
    with pytest.raises(DataError, match=message) as caught:
        dataset = Dataset([small])
        for sample_id in range(len(dataset)):
            dataset.read(sample_id)
    assert name in str(caught.value) or "shard-000001" in str(caught.value)
    assert any(isinstance(found, DataError) for found in check_folder(small))


def test_missing_shard_and_missing_manifest(small, tmp_path):
    (small / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000002\.tar: the shard is missing"):
        Dataset([small])
    with pytest.raises(DataError, match="data build"):
        Dataset([tmp_path / "in"])


def test_manifest_cannot_lead_out_of_its_folder(small):
    damage(
        small / "manifest.json",
        lambda data: data.__setitem__(slice(None), bytes(data).replace(b"shard-000000.tar", b"../../etc/passwd")),
    )
    with pytest.raises(DataError, match="out of its folder"):
        Dataset([small])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_only_regular_members(kind):
    header = tarfile.TarInfo("k.json")
    header.type, header.linkname = kind, "/etc/passwd"
    with pytest.raises(DataError, match="not a regular file"):
        list(parse_members(header.tobuf(tarfile.USTAR_FORMAT)))


def test_member_cut_short():
    header = tarfile.TarInfo("k.json")
    header.size = 2000
    with pytest.raises(DataError, match="cut short"):
        list(parse_members(header.tobuf(tarfile.USTAR_FORMAT) + bytes(512)))
    with pytest.raises(DataError, match="damaged tar header"):
        list(parse_members(bytes(512)))


def test_check_of_a_sound_folder(small):
    assert list(check_folder(small)) == [f"digits-{i:09d}" for i in range(12)]


def test_check_finds_an_image_that_does_not_decode(tmp_path, make_digits):
    """The index and the crc32 are right, the pixels are not: only decoding tells."""
    path = make_digits(tmp_path / "in", 3)
    build(path, tmp_path / "out")
    shard = tmp_path / "out" / "shard-000000.tar"
    table = np.load(shard.with_suffix(".samples.npy"))

    def cut_pixels(data):
        start = int(table["offset"][1])
        at = data.index(b"IDAT", start) + 12
        data[at : at + 8] = bytes(8)
        table["crc32"][1] = zlib.crc32(data[start : start + int(table["span"][1])])

    damage(shard, cut_pixels)
    np.save(shard.with_suffix(".samples.npy"), table)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["shards"][0]["index"][0] = zlib.crc32(table.tobytes())
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    found = list(check_folder(tmp_path / "out"))
    problems = [f for f in found if isinstance(f, DataError)]
    assert len(problems) == 3 and "sha256" in problems[0].message
    assert problems[1].key == "digits-000000001" and "decoded" in problems[1].message
    assert "the crc32 of an image" in problems[2].message  # the sample after it shares the image
