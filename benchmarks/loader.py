"""What the data loader costs: planning a billion samples, reading and decoding against bare Pillow, and whether cores feed a GPU.

    python benchmarks/loader.py [scale] [decode] [demand] [--shards 100000] [--images 300] [--mfu 0.4] [--cores 4]

*scale* opens a manifest of 1e9 samples (its shards are links to one empty file), enters the order at places of several
epochs and plans packed rows of log-normal lengths, tokens looked up as from the index. *decode* reads the same JPEG
files twice in one process on one thread, batch by batch in turn: ``Image.open(path).convert("RGB")``, and through the
whole loader (order, packing, tar shards, crc32, checks) with a processor that makes no pixels. Both count CPU seconds
of the process; times to open and to resume are by the clock. *demand* reads photographs (scikit-learn's two, cut and scaled,
640 to 1600 pixels wide, JPEG) with a question and an answer each into packed rows of 8,192 tokens for a model in SmolVLM2-2.2B's
shape, through its processor: images/s that one GPU needs at an MFU, by the operations of these rows, and images/s that cores
deliver, by CPU seconds of one process.
"""

import argparse
import io
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.row import EncodedSample
from megatron_vlm.data.shards.dataset import Dataset
from megatron_vlm.data.shards.writer import MANIFEST_VERSION
from megatron_vlm.data.stream.counts import COUNT_DTYPE
from megatron_vlm.data.stream.loader import RowLoader
from megatron_vlm.data.stream.mixture import Mixture, resolve
from megatron_vlm.data.stream.step_plan import DataState, Stream
from megatron_vlm.data.types import TokenCount

SAMPLES = 10**9
BARS = {
    "memory_mb": 150,
    "resume_s": 1.0,
    "samples_per_cpu_s": 200_000,
    "decode_ratio": 0.95,
    "delivered_of_needed": 1.0,
}


def lengths_like_text(number: int, seed: int = 0) -> np.ndarray:
    """int64: log-normal token counts between 50 and 2000, median 300."""
    values = np.exp(np.random.default_rng(seed).normal(np.log(300), 0.9, number))
    return values.clip(50, 2000).astype(np.int64)


def peak_memory() -> int:
    """Bytes that this process has had resident at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def synthetic_folder(folder: Path, num_shards: int) -> None:
    """Writes a manifest of SAMPLES samples whose shards are links to one empty file."""
    (folder / "empty").touch()
    with (folder / "manifest.json").open("w") as file:  # line by line: what is measured later is the reader's memory
        file.write(f'{{"version": {MANIFEST_VERSION}, "samples": {SAMPLES}, "images": 0, "shards": [')
        for number in range(num_shards):
            name = f"shard-{number:06d}.tar"
            os.symlink("empty", folder / name)
            shard = {
                "name": name,
                "samples": SAMPLES // num_shards,
                "images": 0,
                "bytes": 0,
                "sha256": f"{number:064x}",
            }
            file.write(("," if number else "") + json.dumps(shard))
        file.write("]}")


def scale(num_shards: int) -> dict[str, float]:
    """Measures memory, time to resume and the rate of planning for SAMPLES samples."""
    from megatron_vlm.data.config import SourceConfig

    table = np.zeros(65_536, dtype=COUNT_DTYPE)
    table["tokens"] = lengths_like_text(len(table))
    config = DataConfig(seq_length=4096, packing=True, num_workers=0)
    with tempfile.TemporaryDirectory() as directory:
        synthetic_folder(Path(directory), num_shards)
        before = peak_memory()
        started = time.perf_counter()
        dataset = Dataset([directory])
        opened = time.perf_counter() - started
        assert len(dataset) == SAMPLES
    mixture = Mixture(resolve(dataset.folders, [SourceConfig(path=directory)]), seed=1, window=config.packing_window)

    def counts(ids: np.ndarray) -> np.ndarray:
        dataset.locate(ids)
        return table[ids % len(table)]

    resumed = []
    for epoch in (0, 1, 7):
        for share in (0.0, 0.123, 0.5, 0.999999):
            started = time.perf_counter()
            stream = Stream(counts, mixture, config)
            state = DataState(seed=1, epoch=epoch, window=int(share * mixture.num_windows), item=3)
            steps = stream.steps(state, global_batch_size=256, micro_batch_size=1, dp_rank=0, dp_size=8)
            next(steps)
            resumed.append(time.perf_counter() - started)
    rates = []
    for _ in range(8):
        started, samples = time.process_time(), 0
        while samples < 40_000:
            samples += len(next(steps).sample_ids)
        rates.append(samples / (time.process_time() - started))
    return {
        "shards": num_shards,
        "open_s": round(opened, 2),
        "memory_mb": round((peak_memory() - before) / 1e6, 1),
        "resume_s": round(max(resumed), 3),
        "samples_per_cpu_s": round(statistics.median(rates)),
    }


@dataclass(frozen=True, kw_only=True)
class NoPixels:
    """A processor that makes eight tokens of a sample and nothing of its images: what is left is the loader."""

    image_token_id: int = 0
    filler_token_id: int = 0
    seq_length: int = 128
    truncate: bool = False
    fingerprint: str = "0" * 64

    def count(self, turns, image_sizes, options=None) -> TokenCount:
        """See data.types.Processor."""
        return TokenCount(tokens=8, supervised=4, image_tokens=0, patches=0)

    def encode(self, key, turns, images, seed=0, options=None) -> EncodedSample:
        """See data.types.Processor."""
        ids = torch.arange(8)
        return EncodedSample(key=key, input_ids=ids, labels=ids)


def photo(size: tuple[int, int], seed: int) -> bytes:
    """A JPEG of soft shapes and grain: about the bytes per pixel of a photograph."""
    generator = np.random.default_rng(seed)
    soft = Image.fromarray(generator.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    grain = generator.normal(0, 8, (size[1], size[0], 3))
    values = (np.asarray(soft, dtype=np.float64) + grain).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "JPEG", quality=85)
    return file.getvalue()


def decode(num_images: int, size: tuple[int, int] = (640, 480)) -> dict[str, float]:
    """Measures images per CPU second, bare and through the loader, in turn."""
    from megatron_vlm.data.formats import open_sources
    from megatron_vlm.data.shards.build import build_shards

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [folder / f"{i}.jpg" for i in range(num_images)]
        for index, path in enumerate(files):
            path.write_bytes(photo(size, index))
        text = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A picture."}]
        records = [{"id": path.stem, "image": path.name, "conversations": text} for path in files]
        (folder / "all.json").write_text(json.dumps(records))
        build_shards(open_sources("llava", [folder / "all.json"], root=name), folder / "shards")
        loader = RowLoader(
            DataConfig(seq_length=128, packing=True, num_workers=0),
            NoPixels(),
            paths=[folder / "shards"],
            seed=1,
            global_batch_size=2,
            micro_batch_size=1,
            dp_rank=0,
            dp_size=1,
        )
        loader.next_step()
        bare, ours, through = 0.0, 0.0, 0
        for _ in range(3):
            for start in range(0, num_images, 32):
                batch = files[start : start + 32]
                before = time.process_time()
                for path in batch:
                    Image.open(path).convert("RGB")
                bare += time.process_time() - before
                before = time.process_time()
                through += loader.next_step().num_samples
                ours += time.process_time() - before
        loader.close()
        mean = sum(path.stat().st_size for path in files) / num_images
    rates = 3 * num_images / bare, through / ours
    return {
        "image_kb": round(mean / 1e3, 1),
        "pillow_images_per_cpu_s": round(rates[0], 1),
        "loader_images_per_cpu_s": round(rates[1], 1),
        "decode_ratio": round(rates[1] / rates[0], 3),
    }


def photographs(folder: Path, number: int) -> None:
    """Writes ``number`` records with a JPEG each: cuts of two photographs."""
    from sklearn.datasets import load_sample_image

    draw, records = random.Random(0), []
    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    for index in range(number):
        left, top = draw.randrange(0, 160), draw.randrange(0, 100)
        cut = photos[index % 2].crop((left, top, left + 480, top + 320))
        width = draw.randrange(640, 1601)
        cut.resize((width, width * 2 // 3), Image.Resampling.LANCZOS).save(folder / f"{index}.jpg", quality=90)
        words = " ".join(
            draw.choice(("a", "wall", "of", "stone", "the", "red", "leaf")) for _ in range(draw.randrange(20, 300))
        )
        text = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": words}]
        records.append({"id": str(index), "image": f"{index}.jpg", "conversations": text})
    (folder / "all.json").write_text(json.dumps(records))


def demand(num_images: int, mfu: float, cores: int, peak_tflops: float) -> dict[str, float]:
    """Measures images/s that one GPU needs and that cores deliver."""
    from vlm_table import hf_config

    from megatron_vlm import registry
    from megatron_vlm.data.formats import open_sources
    from megatron_vlm.data.shards.build import build_shards
    from megatron_vlm.testing.twins.smolvlm import write_tiny_smolvlm
    from megatron_vlm.training.memory.flops import forward_flops

    spec, figures = registry.get("smolvlm"), {}
    model, side = spec.config(hf_config("smolvlm", False).to_dict()), 378
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photographs(folder, num_images)
        build_shards(open_sources("llava", [folder / "all.json"], root=name), folder / "shards")
        sizes: dict = dict(
            vision=dict(image_size=side, patch_size=14), text=dict(max_position_embeddings=8192), shuffle=3
        )
        write_tiny_smolvlm(folder / "hf", most=4, **sizes)  # for its tokenizer and processor
        for kind, splitting in (("whole", False), ("in_tiles", True)):
            for scaled in (False, True):
                config = DataConfig(
                    seq_length=8192, packing=True, num_workers=0, image_splitting=splitting, jpeg_scaled_decoding=scaled
                )
                whose = dict(global_batch_size=1, micro_batch_size=1, dp_rank=0, dp_size=1)
                processor = spec.open_processor(folder / "hf", config)
                loader = RowLoader(config, processor, paths=[folder / "shards"], seed=1, **whose)
                loader.next_step()
                seconds, flops, images = 0.0, 0.0, 0
                while images < num_images:
                    before = time.process_time()
                    (row,) = loader.next_step().rows
                    seconds += time.process_time() - before
                    shapes = [(3, side, side) for pixels in row.pixels]
                    segments = row.segments[: len(row.keys)]
                    work = forward_flops(model, images=shapes, segments=segments, supervised=row.num_supervised)
                    flops, images = flops + work.training(), images + len(row.keys)
                loader.close()
                needed, delivered = images / (flops / (mfu * peak_tflops * 1e12)), cores * images / seconds
                name = f"{kind}{'_scaled' if scaled else ''}"
                figures |= {f"{name}_needed_images_per_s": round(needed, 1)}
                figures |= {f"{name}_delivered_by_{cores}_cores": round(delivered, 1)}
                figures |= {f"{name}_delivered_of_needed": round(delivered / needed, 2)}
    return figures


def main() -> int:
    """Runs what is asked for and prints a table; exit 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("parts", nargs="*", help="scale, decode, demand (default: the first two)")
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--mfu", type=float, default=0.4, help="of the GPU that demand feeds")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the same in bf16: an H100")
    parser.add_argument("--cores", type=int, default=4)
    args = parser.parse_args()
    figures: dict[str, float] = {}
    for part in args.parts or ["scale", "decode"]:
        if part == "demand":
            figures |= demand(args.images, args.mfu, args.cores, args.peak_tflops)
        else:
            figures |= scale(args.shards) if part == "scale" else decode(args.images)
    failed = False
    print("| figure | value | bar |\n| --- | --- | --- |")
    for figure, value in figures.items():
        bar, missed = "", False
        limit = next((limit for name, limit in BARS.items() if figure.endswith(name)), None)
        if limit is not None:
            most = figure in ("memory_mb", "resume_s")
            missed = value > limit if most else value < limit
            bar = f"{'at most' if most else 'at least'} {limit:,}: {'NOT MET' if missed else 'met'}"
        failed = failed or missed
        print(f"| {figure} | {value:,} | {bar} |")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
