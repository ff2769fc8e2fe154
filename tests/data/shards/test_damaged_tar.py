"""Archives with pax headers of times are listed as by tarfile's own reading of them, and refused in the same words."""

import contextlib
import io
import random
import tarfile
from collections import Counter

from megatron_vlm.data.shards import tar
from megatron_vlm.data.shards.tar import index_tar
from megatron_vlm.errors import DataError
from tests.data.corpus import CASES


def odd_tar(draw):
    """An archive of up to five members, of any format, with long names, folders, links and pax records; then damaged."""
    buffer, times = io.BytesIO(), draw.random() < 0.5  # with a fraction of a second: a pax header each
    with tarfile.open(fileobj=buffer, mode="w", format=2 if times else draw.choice((0, 1, 2))) as archive:
        for i in range(draw.randrange(6)):
            folder = draw.choice(("", "d/", "a.b/c/", "x" * draw.randrange(1, 99) + "/", "./", "y" * 120 + "/"))
            names = (f"{i}.a.png", f"{i // 2}.txt", "é" * draw.randrange(1, 60), "n" * draw.randrange(1, 130), "../b")
            plain = times and draw.random() < 0.9
            header = tarfile.TarInfo(draw.choice(names[:2]) if plain else folder + draw.choice(names))
            header.size = draw.choice((0, 1, 511, 512, 513))
            if draw.random() < 0.2:
                header.type = draw.choice((b"5", b"5", b"5", b"1", b"2", b"3"))
                header.size = draw.choice((0, 0, 700))
                header.linkname = "q" * draw.choice((3, 150))
            if times or draw.random() < 0.2:
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


def with_plain_numbers(data, one):
    """The archive with mode, owner, time and device, which nothing here reads, made whole again in each listed header."""
    data, (starts, offsets, *_) = bytearray(data), one[0]
    for at in {*starts, *(offset - 512 for offset in offsets)}:
        block = data[at : at + 512]
        block[100:124], block[135:136], block[136:148], block[329:345] = (
            b"0000000\0" * 3,
            b"\0",
            b"0" * 11 + b"\0",
            bytes(16),
        )
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        data[at : at + 512] = block
    return bytes(data)


def test_the_short_way_says_what_tarfile_says(tmp_path, monkeypatch):
    """The whole corpus of malformed tars, and archives damaged at random: the same members, or the same words.

    In what the short way lists, numbers that nothing reads may be damaged, as in archives without pax headers; tarfile lists the
    same once they are whole.
    """
    draw, path = random.Random(5), tmp_path / "odd.tar"
    corpus = [data for _, file, data, _ in CASES if file.endswith(".tar")]
    found, taken, tell = Counter(), [], tar._tell_times_alone

    def slowly():
        monkeypatch.setattr(tar, "_tell_times_alone", lambda *args: False)
        return outcome(path)

    for data in corpus + [odd_tar(draw) for _ in range(1500)]:
        path.write_bytes(data)
        taken.clear()
        monkeypatch.setattr(tar, "_tell_times_alone", lambda *args: taken.append(tell(*args)) or taken[0])
        one = outcome(path)
        short = any(taken)
        if one != slowly():
            assert short
            path.write_bytes(with_plain_numbers(data, one))
            assert one == slowly()
            found["unread"] += 1
        found.update({"short": short, "refused" if isinstance(one, str) else "listed": 1})
    assert len(corpus) >= 40 and min(found["listed"], found["refused"]) > 300, found
    assert found["short"] > 200 and found["unread"] < found["short"] / 4, found
