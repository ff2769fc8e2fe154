"""The walk over tar headers in C and the one in Python list the same and refuse the same in the same words."""

import contextlib
import io
import random
import tarfile

from megatron_vlm.data.shards import tar
from megatron_vlm.data.shards.tar import index_tar
from megatron_vlm.errors import DataError
from tests.data.corpus import CASES


def odd_tar(draw):
    """An archive of up to five members, of any format, with long names, folders, links and pax records; then damaged."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=draw.choice((0, 1, 2))) as archive:
        for i in range(draw.randrange(6)):
            folder = draw.choice(("", "d/", "a.b/c/", "x" * draw.randrange(1, 99) + "/", "./", "y" * 120 + "/"))
            names = (f"{i}.a.png", f"{i // 2}.txt", "é" * draw.randrange(1, 60), "n" * draw.randrange(1, 130), "../b")
            header = tarfile.TarInfo(folder + draw.choice(names))
            header.size = draw.choice((0, 1, 511, 512, 513))
            if draw.random() < 0.2:
                header.type = draw.choice((b"5", b"5", b"5", b"1", b"2", b"3"))
                header.size = draw.choice((0, 0, 700))
                header.linkname = "q" * draw.choice((3, 150))
            if draw.random() < 0.2:
                header.mtime = draw.random() * 1e9
            if draw.random() < 0.1:
                records = (
                    ("comment", "hi"),
                    ("path", "b.txt"),
                    ("path", "b/"),
                    ("size", "3"),
                    ("hdrcharset", "BINARY"),
                )
                header.pax_headers = dict(
                    [draw.choice((*records, ("GNU.sparse.size", "9"), ("SCHILY.xattr.a", "\1=\n")))]
                )
            with contextlib.suppress(ValueError):  # a name that ustar cannot hold
                archive.addfile(header, io.BytesIO(bytes(header.size)))
    data = bytearray(buffer.getvalue())
    for _ in range(draw.choice((0, 1, 1, 2))):
        damage(draw, data)
    return bytes(data)


def damage(draw, data):
    """Changes bytes of a header, copies or drops a block, or cuts the file; mostly puts the checksum right again."""
    at, kind = draw.randrange(len(data) // 512) * 512, draw.random()
    if kind < 0.7:
        edges = (0, 99, 100, 108, 116, 124, 134, 135, 136, 148, 154, 155, 156, 262, 329, 345, 499, 511)
        data[at + draw.choice((*edges, draw.randrange(512)))] = draw.choice((0, 32, 48, 55, 56, 128, *b"5xgLKS/", 255))
    elif kind < 0.8:
        del data[at : at + 512]
    elif kind < 0.9:
        other = draw.randrange(len(data) // 512) * 512
        data[at:at] = data[other : other + 512]
    else:
        del data[draw.randrange(len(data)) :]
    data.extend(bytes(max(0, 512 - len(data))))
    block = data[at : at + 512]
    if len(block) == 512 and any(block) and draw.random() < 0.8:
        block[148:156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(block)


def outcome(path):
    try:
        index = index_tar(path)
        places = [part.tolist() for part in (index.starts, index.offsets, index.sizes, index.groups)]
    except DataError as error:
        return str(error)
    try:
        return places, index.end, index.raw_names, index.names()
    except DataError as error:
        return places, index.end, index.raw_names, str(error)


def test_both_walks_say_the_same_of_damaged_archives(tmp_path, monkeypatch):
    """The whole corpus of malformed tars, and archives damaged at random: the same members, or the same words."""
    draw, path = random.Random(5), tmp_path / "odd.tar"
    corpus = [data for _, file, data, _ in CASES if file.endswith(".tar")]
    found = {"listed": 0, "refused": 0}
    for data in corpus + [odd_tar(draw) for _ in range(1500)]:
        path.write_bytes(data)
        outcomes = []
        for native in (None, tar._native):
            monkeypatch.setattr(tar, "_native", native)
            outcomes.append(outcome(path))
        assert all(one == outcomes[0] for one in outcomes)
        found["refused" if isinstance(outcomes[0], str) else "listed"] += 1
    assert len(corpus) >= 40 and min(found.values()) > 300, found
