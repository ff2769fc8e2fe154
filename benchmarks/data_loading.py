"""What stands between raw inputs and shards: the tar index against tarfile, and building shards.

    python benchmarks/data_loading.py [index] [build] [--images 400] [--workers 2]

*index* lists the members of tars (a picture and a json each, three sizes of picture) with ``data.tar.index_tar``, which
checks every header and groups members into samples, and with ``tarfile``; both count CPU seconds, files in the page
cache. *build* turns LLaVA records with JPEG files into shards and counts samples by the clock.
"""

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_vlm.data.build import build_shards
from megatron_vlm.data.formats import open_sources
from megatron_vlm.data.tar import index_tar

SIZES = {400: 15_000, 4_000: 8_000, 40_000: 1_500}  # bytes of a picture: samples


def write_tar(path: Path, size: int, number: int) -> None:
    """Writes ``number`` samples: a picture of ``size`` bytes, more or less, and a json."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(number):
            for part, length in (("jpg", size // 2 + i * 7919 % size), ("json", 200 + i % 50)):
                header = tarfile.TarInfo(f"{i:09d}.{part}")
                header.size = length
                tar.addfile(header, io.BytesIO(bytes(length)))


def cpu_seconds(work: Callable[[Path], object], path: Path) -> float:
    """Returns the CPU seconds of one call."""
    started = time.process_time()
    work(path)
    return time.process_time() - started


def members_of(path: Path) -> list[tarfile.TarInfo]:
    """Lists members with tarfile."""
    with tarfile.open(path) as tar:
        return tar.getmembers()


def index(folder: Path) -> list[str]:
    """Returns a table row for each size."""
    rows = []
    for size, number in SIZES.items():
        path = folder / "a.tar"
        write_tar(path, size, number)
        pairs = [(cpu_seconds(index_tar, path), cpu_seconds(members_of, path)) for _ in range(5)]
        ours, theirs = (2 * number / statistics.median(column) for column in zip(*pairs))
        ratio = statistics.median(b / a for a, b in pairs)
        rows.append(
            f"| index, pictures of {size} bytes | {ours:,.0f} members/s | {theirs:,.0f} members/s | {ratio:.1f} x |"
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
        rate = images / (time.perf_counter() - started)
        rows.append(f"| build, 640 x 480 JPEG, {number or 'no'} worker processes | {rate:,.0f} samples/s | | |")
    return rows


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="index, build (default: both)")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    parts = args.parts or ["index", "build"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if "index" in parts:
            rows += index(Path(folder))
        if "build" in parts:
            rows += build(Path(folder), args.images, args.workers)
    print("| what | here | tarfile | ratio |\n| --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
