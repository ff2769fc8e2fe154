"""The walk over tar headers agrees with tarfile, whatever wrote the archive, and groups members as webdataset does."""

import io
import itertools
import random
import tarfile

import pytest
import webdataset

from megatron_vlm.data.shards import tar
from megatron_vlm.data.shards.tar import index_tar
from megatron_vlm.errors import DataError
from tests.data.formats.make import write_tar


def members(seed, number=200):
    """Names with and without folders, dots and slashes in odd places, runs of one key; sizes from none to several blocks."""
    draw, made = random.Random(seed), []
    for i in range(number):
        key = draw.choice(("", "d.ir/", "a/b.c/", "./")) + draw.choice(
            (f"{i:05d}", f"{i}_x-é", "k" * draw.randrange(1, 60))
        )
        for part in draw.sample(("jpg", "1.png", "json", "seg.txt", ""), draw.randrange(1, 5)):
            made.append((f"{key}.{part}" if part else key, draw.randbytes(draw.choice((0, 1, 511, 512, 513, 5000)))))
    return made


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_tarfile(tmp_path, format, seed):
    path = write_tar(tmp_path / "a.tar", members(seed), format=format)
    index = index_tar(path)
    with tarfile.open(path) as archive:
        expected = [(m.name, m.offset, m.offset_data, m.size) for m in archive]
    assert list(zip(index.names(), index.starts.tolist(), index.offsets.tolist(), index.sizes.tolist())) == expected
    assert index.end <= path.stat().st_size - 1024


def test_long_names_of_every_kind(tmp_path):
    names = ["x" * 99, "y" * 100, "z" * 101, "d/" * 60 + "deep.txt", "f/" * 100 + "deeper.txt"]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert index_tar(write_tar(tmp_path / "a.tar", [(n, b"1") for n in names], format=format)).names() == names
    short = [n for n in names if len(n) <= 100 or n.startswith("d/")]  # ustar keeps the folder in a field of its own
    ustar = write_tar(tmp_path / "b.tar", [(n, b"1") for n in short], format=tarfile.USTAR_FORMAT)
    assert index_tar(ustar).names() == short


def test_what_webdataset_writes(tmp_path, monkeypatch):
    """Its writer gives every member a pax header for the fraction of a second; tarfile, fifty times slower, is not asked."""
    monkeypatch.setattr(tar, "_named_by_tarfile", None)
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(50):
            writer.write({"__key__": f"d/{i:04d}", "jpg": bytes(i), "txt": "hello"})
    index = index_tar(tmp_path / "a.tar")
    assert index.names()[:3] == ["d/0000.jpg", "d/0000.txt", "d/0001.jpg"] and len(index.groups) == 50
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert [(m.offset, m.offset_data) for m in archive] == list(zip(index.starts.tolist(), index.offsets.tolist()))


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_those_of_webdataset(tmp_path, seed):
    path = write_tar(tmp_path / "a.tar", [(n, b"1") for n, _ in members(seed) if "." in n.rsplit("/", 1)[-1]])
    index = index_tar(path)
    names, bounds = index.names(), [*index.groups.tolist(), len(index.starts)]
    found = [set(names[a:b]) for a, b in itertools.pairwise(bounds)]
    samples = webdataset.WebDataset([str(path)], shardshuffle=False, empty_check=False)
    expected = [{f"{s['__key__']}.{part}" for part in s if not part.startswith("__")} for s in samples]
    # webdataset folds the case of parts and joins runs of one key; these keys are all in runs already.
    assert found == expected


def test_many_members_over_several_windows(tmp_path):
    made = [(f"{i // 2:07d}.{'ab'[i % 2]}", b"x" * (i % 700)) for i in range(10_000)]
    index = index_tar(write_tar(tmp_path / "a.tar", made))
    assert index.names() == [name for name, _ in made] and index.sizes.tolist() == [len(c) for _, c in made]
    assert index.groups.tolist() == list(range(0, 10_000, 2))


def test_sizes_written_in_other_ways(tmp_path):
    """Blanks for zeros in front, a NUL early, base 256: all are read by tarfile, and here."""
    for field in (b"          5\0", b"5\0" + bytes(10), b"0000000005 \0", b"\x80" + bytes(10) + b"\x05"):
        buffer = io.BytesIO(write_tar(tmp_path / "a.tar", [("a.txt", b"hello"), ("b.txt", b"you")]).read_bytes())
        block = bytearray(buffer.getvalue()[:512])
        block[124:136], block[148:156] = field, b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        (tmp_path / "a.tar").write_bytes(bytes(block) + buffer.getvalue()[512:])
        with tarfile.open(tmp_path / "a.tar") as archive:
            assert [m.size for m in archive] == [5, 3]
        assert index_tar(tmp_path / "a.tar").sizes.tolist() == [5, 3]


def test_every_flipped_header_byte_is_noticed(tmp_path):
    """A flip in a header is found by its checksum; none goes through as another member."""
    data = write_tar(tmp_path / "a.tar", [("a.txt", b"hello"), ("b.txt", b"you")]).read_bytes()
    for at in range(0, 500, 7):
        (tmp_path / "b.tar").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        try:
            index = index_tar(tmp_path / "b.tar")
        except DataError:
            continue
        assert index.names() == ["a.txt", "b.txt"] and index.sizes.tolist() == [5, 3]  # padding of the sum's own field
