"""What stands between raw inputs and shards: the tar index against tarfile, and building shards.

    python benchmarks/data_loading.py [index] [build] [--share 1.0] [--images 400] [--workers 2]

*index* lists the members of tars (a picture and a json each, three sizes of picture, without and with a pax header a member:
webdataset's own writer makes them with) by ``data.tar.index_tar``, which checks every header and groups members into samples,
and by ``tarfile``; both count CPU seconds, the best call of those that fit into three seconds. The files are copies in the
page cache, as shards come to a machine: the cache holds a file that was written a few bytes at a time in small pieces, which
are slower to read. *build* turns LLaVA records with JPEG files into shards and counts samples by the clock.
"""

import argparse
import io
import json
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_vlm.data.formats import open_sources
from megatron_vlm.data.shards.build import build_shards
from megatron_vlm.data.shards.tar import index_tar

# Bytes of a picture, samples, format of the tar.
TARS = [
    (size, samples, format)
    for format in (tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)
    for size, samples in ((400, 15_000), (4_000, 8_000), (40_000, 1_500))
]
SECONDS = 3.0  # for each side of a row


def write_tar(path: Path, size: int, number: int, format: int) -> None:
    """Writes ``number`` samples: a picture of ``size`` bytes, more or less, and a json."""
    with tarfile.open(path, "w", format=format) as tar:
        for i in range(number):
            for part, length in (("jpg", size // 2 + i * 7919 % size), ("json", 200 + i % 50)):
                header = tarfile.TarInfo(f"{i:09d}.{part}")
                header.size = length
                header.mtime = i if format == tarfile.USTAR_FORMAT else i + 0.5  # a fraction needs a pax header
                tar.addfile(header, io.BytesIO(bytes(length)))


def rate(work: Callable[[Path], object], path: Path, members: int) -> float:
    """Returns members a CPU second in the least disturbed of the calls that fit into SECONDS."""
    best, until = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < until or best == float("inf"):
        started = time.process_time()
        work(path)
        best = min(best, time.process_time() - started)
    return members / best


def members_of(path: Path) -> list[tarfile.TarInfo]:
    """Lists members with tarfile."""
    with tarfile.open(path) as tar:
        return tar.getmembers()


def index(folder: Path, share: float) -> list[str]:
    """Returns a table row for each tar, made with a ``share`` of its samples."""
    rows = []
    for size, samples, format in TARS:
        written, path, number = folder / "written.tar", folder / "a.tar", max(1, int(samples * share))
        write_tar(written, size, number, format)
        shutil.copyfile(written, path)
        ours, theirs = rate(index_tar, path, 2 * number), rate(members_of, path, 2 * number)
        kind = ", pax headers" if format == tarfile.PAX_FORMAT else ""
        rows.append(
            f"| index, pictures of {size} bytes{kind} | {ours:,.0f} members/s | {theirs:,.0f} members/s | {ours / theirs:.1f} x |"
        )
    return rows


def build(folder: Path, images: int, workers: int) -> list[str]:
    """Returns a table row for building in this process and in ``workers``."""
    noise = np.random.default_rng(0)
    records = []
    for i in range(images):
        soft = Image.fromarray(noise.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize((640, 480))
        soft.save(folder / f"{i}.jpg", quality=90)
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A picture."}]
        records.append({"id": i, "image": f"{i}.jpg", "conversations": turns})
    (folder / "a.json").write_text(json.dumps(records))
    rows = []
    for number in (0, workers):
        sources = open_sources("llava", [folder / "a.json"], root=str(folder))
        started = time.perf_counter()
        build_shards(sources, folder / f"out{number}", samples_per_shard=max(1, images // 8), num_workers=number)
        speed = images / (time.perf_counter() - started)
        rows.append(f"| build, 640 x 480 JPEG, {number or 'no'} worker processes | {speed:,.0f} samples/s | | |")
    return rows


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="index, build (default: both)")
    parser.add_argument("--share", type=float, default=1.0, help="of the samples of the tars that are listed")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    parts = args.parts or ["index", "build"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if "index" in parts:
            rows += index(Path(folder), args.share)
        if "build" in parts:
            rows += build(Path(folder), args.images, args.workers)
    print("| what | here | tarfile | ratio |\n| --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
