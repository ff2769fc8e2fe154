"""Tar shards and their index: written once, read sample by sample with one ``pread``.

    DIR/manifest.json              shards with samples, images, bytes and sha256; sources with their repeats
    DIR/shard-000000.tar           KEY.json, KEY.0.png, KEY.1.jpg ...: any webdataset reader opens it
    DIR/shard-000000.samples.npy   SAMPLE_DTYPE a sample: where it lies, its crc32, its images
    DIR/shard-000000.images.npy    IMAGE_DTYPE an image of a sample: where its bytes lie, their crc32, its size upright

An image that several samples of a shard use is stored once, with the first of them; ``members`` in KEY.json names the
tar members of a sample's images. The same records give the same bytes: member headers carry no time, owner or path of
this machine. Tars of other tools are indexed where they lie (``tar`` in the manifest) and read in their own form.
"""

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.formats.json_file import strict_decoder
from megatron_vlm.data.formats.records import (
    IMAGE_PLACEHOLDER,
    OWN_VIDEO,
    VIDEO_PLACEHOLDER,
    Record,
    RecordSource,
    VideoSettings,
    check_turns,
)
from megatron_vlm.data.images.pictures import probe_image, read_image_file
from megatron_vlm.data.images.video import read_frames, with_videos
from megatron_vlm.data.sample import MAX_IMAGES, MAX_SPAN, RawSample, Turn, Video
from megatron_vlm.data.shards.tar import BLOCK
from megatron_vlm.errors import DataError, Reason

MANIFEST = "manifest.json"
MANIFEST_VERSION = 2
SAMPLE_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # of the first member's header
        ("span", "<u4"),  # bytes up to the next sample
        ("crc32", "<u4"),  # of those bytes
        ("first_image", "<u4"),  # row of the shard's image table
        ("num_images", "<u2"),
    ]
)
IMAGE_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # of the encoded image
        ("size", "<u4"),  # its bytes
        ("crc32", "<u4"),  # of those bytes
        ("width", "<u2"),  # upright
        ("height", "<u2"),
    ]
)


def load_record(
    source: RecordSource, record: Record, own: VideoSettings = OWN_VIDEO
) -> tuple[tuple[Turn, ...], list[tuple[str, bytes]]]:
    """Reads a record's images and the frames of its videos.

    Args:
        source, record: which.
        own: how the model, where there is one, takes frames of a video.

    Returns:
        Its turns with their videos, and (name, encoded image) in order of use, frames among them.

    Raises:
        DataError: a file that cannot be read.
    """
    root = Path(source.root)
    images = iter(
        (name, read_image_file(root / name))
        if isinstance(name, str)
        else (record.names[index] if record.names else f"#{index}", name)
        for index, name in enumerate(record.images)
    )
    if not record.videos:
        return record.turns, list(images)
    settings = source.video.filled(own)
    videos = [read_frames(root, name, settings) for name in record.videos]
    left, found = iter(frames for _, frames in videos), []
    text = "".join(turn.text for turn in record.turns)
    while text:
        marks = [(text.find(mark), mark) for mark in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER) if mark in text]
        if not marks:
            break
        place, mark = min(marks)
        found += [next(images)] if mark == IMAGE_PLACEHOLDER else next(left)
        text = text[place + len(mark) :]
    return with_videos(record.turns, [video for video, _ in videos], settings), found


class ShardWriter:
    """Writes one tar shard and, on ``close``, its index."""

    def __init__(self, path: Path):
        self.path = path
        self.num_samples = 0
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._size = 0
        self._samples: list[tuple[int, ...]] = []
        self._images: list[tuple[int, ...]] = []
        self._stored: dict[bytes, tuple[str, tuple[int, ...]]] = {}  # digest -> member's name, row of the image table

    def add(self, key: str, text: dict[str, Any], turns: Sequence[Turn], images: Sequence[tuple[str, bytes]]) -> None:
        """Appends one sample.

        Args:
            key: of the sample.
            text: what else its KEY.json says.
            turns: the conversation.
            images: (name, encoded image), in order.

        Raises:
            DataError: an image that cannot be decoded; nothing is written then.
        """
        if len(images) > MAX_IMAGES:
            raise DataError(f"{len(images)} images, the limit is {MAX_IMAGES}")
        new: dict[bytes, tuple[str, bytes, tuple[int, int]]] = {}  # of this sample: not stored before
        digests = []
        for index, (name, data) in enumerate(images):
            digest = hashlib.sha256(data).digest()
            digests.append(digest)
            if digest not in self._stored and digest not in new:
                extension, width, height = probe_image(data, f"image {name}")
                new[digest] = (f"{key}.{index}.{extension}", data, (width, height))
        members = [self._stored[d][0] if d in self._stored else new[d][0] for d in digests]
        content = {
            **text,
            "turns": [_written(turn) for turn in turns],
            "images": [name for name, _ in images],
            "members": members,
        }
        parts = [member(f"{key}.json", json.dumps(content, ensure_ascii=False).encode())]
        position = self._size + len(parts[0])
        for digest, (name, data, size) in new.items():
            parts.append(member(name, data))
            self._stored[digest] = (name, (position + BLOCK, len(data), zlib.crc32(data), *size))
            position += len(parts[-1])
        if position - self._size > MAX_SPAN:
            for digest in new:
                del self._stored[digest]
            raise DataError(f"the sample has {position - self._size} bytes, the limit is {MAX_SPAN}")
        block = b"".join(parts)
        self._samples.append((self._size, len(block), zlib.crc32(block), len(self._images), len(images)))
        self._images += [self._stored[digest][1] for digest in digests]
        self.num_samples += 1
        self._write(block)

    def close(self) -> dict[str, Any]:
        """Ends the shard and returns its line of the manifest."""
        self._write(bytes(2 * BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = save_index(self.path.with_suffix(""), self._samples, self._images)
        return {
            "name": self.path.name,
            "samples": self.num_samples,
            "images": len(self._images),
            "bytes": self._size,
            "sha256": self._hash.hexdigest(),
            "index": index,
        }

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)


def member(name: str, data: bytes) -> bytes:
    """Returns a tar member: header, content, padding."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    return b"".join((header.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % BLOCK)))


def save_index(stem: Path, samples: Sequence[tuple[int, ...]], images: Sequence[tuple[int, ...]]) -> list[int]:
    """Writes ``STEM.samples.npy`` and ``STEM.images.npy``, synced to disk, and returns the crc32 of each one's rows."""
    sums = []
    for suffix, rows, dtype in ((".samples.npy", samples, SAMPLE_DTYPE), (".images.npy", images, IMAGE_DTYPE)):
        table = np.array(rows, dtype=dtype)
        with stem.with_name(stem.name + suffix).open("wb") as file:
            file.write(table_bytes(table))
            file.flush()
            os.fsync(file.fileno())
        sums.append(zlib.crc32(table.tobytes()))
    return sums


def table_bytes(table: NDArray[Any]) -> bytes:
    """Returns an array as a file of numpy's: written by numpy itself, a full disk would lose its errno."""
    buffer = io.BytesIO()
    np.save(buffer, table, allow_pickle=False)
    return buffer.getvalue()


def parse_text(name: str, content: bytes) -> RawSample:
    """Reads a sample's ``KEY.json`` member: all but its images.

    Raises:
        DataError: what is wrong with it.
    """
    key = name.removesuffix(".json")
    if key == name:
        message = f"a sample starts with its KEY.json member, not with {name!r}"
        raise DataError(message, reason=Reason.DAMAGED_SHARD)
    try:
        data = strict_decoder().decode(content.decode("utf-8"))
        turns = tuple(_turn(turn) for turn in data["turns"])
        options, label = data.get("options", {}), str(data.get("id", ""))
        return RawSample(key=key, turns=turns, image_names=tuple(data["images"]), options=options, label=label)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"bad {name}: {error!r}", reason=Reason.BAD_JSON, key=key) from error


def _written(turn: Turn) -> dict[str, Any]:
    """As KEY.json has it; ``loss`` stands only where it is false, so that data without it has the bytes that it always had."""
    videos = [asdict(video) for video in turn.videos]
    more = {**({} if turn.loss else {"loss": False}), **({"videos": videos} if videos else {})}
    return {"role": turn.role, "text": turn.text, **more}


def _turn(data: dict[str, Any]) -> Turn:
    role, text, loss = data["role"], data["text"], data.get("loss", True)
    if not isinstance(role, str) or not isinstance(text, str) or not isinstance(loss, bool):
        raise TypeError(f"turn {data!r:.200}")
    videos = tuple(
        Video(frames=tuple(map(int, video["frames"])), total=int(video["total"]), fps=float(video["fps"]))
        for video in data.get("videos", ())
    )
    if not all(0 < len(video.frames) <= video.total and 0 < video.fps < inf for video in videos):
        raise ValueError(f"videos of turn {data!r:.200}")
    return Turn(role=role, text=text, loss=loss, videos=videos)


def check_sample(sample: RawSample) -> list[tuple[int, int]]:
    """Checks a sample as ``data build`` does and returns (width, height) of each image.

    Raises:
        DataError: what is wrong with it.
    """
    frames = sum(len(video.frames) for turn in sample.turns for video in turn.videos)
    check_turns(sample.turns, len(sample.images) - frames, sum(len(turn.videos) for turn in sample.turns))
    return [probe_image(data, f"image {name}")[1:] for name, data in zip(sample.image_names, sample.images)]


def num_placeholders(turns: Iterable[Turn]) -> int:
    """Returns the number of images that the places in the texts are for, the frames of videos among them."""
    return sum(turn.text.count(IMAGE_PLACEHOLDER) + sum(len(video.frames) for video in turn.videos) for turn in turns)
