"""What context parallelism costs: how evenly a row is dealt, what ranks exchange, and the CPU's work against one rank.

    python benchmarks/long_rows.py                 balance and bytes, of shapes of published decoders (no model is built)
    python benchmarks/long_rows.py --run           a small Idefics2 on this machine: seconds, operations, bytes, cp 1 and 2
    python benchmarks/long_rows.py --run --tokens 512    the same, shorter
    python benchmarks/long_rows.py --data          CPU seconds of build, count, plan and encode at 256k tokens a row: a document
                                                   of 230k tokens, one of 200 exchanges, one of 512 images, and short ones

Balance is the largest over the mean of the ranks: pairs of query and key that attention works on, and FLOPs of a decoder layer.
Bytes are those of keys and values (gather) or of queries, keys, values and outputs (heads) that a rank and layer receives in
the forward pass, in bf16.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_vlm.layers.context.attention import Deal, attention_work, check_heads

Made = TypeVar("Made")
DECODERS = {"Mistral 7B": (4096, 14336, 32, 8, 128), "Qwen2.5 7B": (3584, 18944, 28, 4, 128)}
"""Hidden size, ffn size, heads, key/value heads, dimension of a head."""


def rows(draw: random.Random) -> dict[str, tuple[int, ...]]:
    """Name -> starts of the segments."""

    def filled(first: list[int], total: int) -> tuple[int, ...]:
        lengths = list(first)
        while sum(lengths) < total:
            lengths.append(min(draw.randint(50, 2000), total - sum(lengths)))
        return (0, *accumulate(lengths))

    return {
        "16k of samples of 50 to 2,000": filled([], 16384),
        "64k of samples of 50 to 2,000": filled([], 65536),
        "64k with one of 40k": filled([40960], 65536),
        "one of 64k": (0, 65536),
        "256k: video of 200k, and short": filled([204800], 262144),
    }


def balance() -> None:
    """Prints both tables."""
    hidden, ffn, heads, groups, dim = DECODERS["Mistral 7B"]
    products = 2 * hidden * (2 * heads * dim + 2 * groups * dim + 3 * ffn)
    print("| row | cp | attention, largest over mean | a layer's FLOPs, largest over mean |\n| --- | --- | --- | --- |")
    made = rows(random.Random(1))
    for name, starts in made.items():
        for size in (2, 4, 8):
            dealt = deal(starts, size, 0).intervals
            pairs = [attention_work(starts, intervals) for intervals in dealt]
            work = [4 * heads * dim * count + products * starts[-1] // size for count in pairs]
            print(f"| {name} | {size} | {worst(pairs):.3f} | {worst(work):.4f} |")
    print("\n| row | decoder | cp | gather, MiB | of all keys and values | window of 4,096, MiB | heads, MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, starts in made.items():
        for decoder, (_, _, heads, groups, dim) in DECODERS.items():
            for size in (2, 4, 8):
                deals = [deal(starts, size, rank) for rank in range(size)]
                token = 2 * 2 * groups * dim
                sent = max(one.received_tokens(None) for one in deals)
                near = max(one.received_tokens(4096) for one in deals)
                others = starts[-1] * (size - 1) / size
                exchanged = others / size * 2 * dim * (2 * heads + 2 * groups) / 2**20
                by_heads = "do not divide" if check_heads(heads, groups, size, 1) else f"{exchanged:.0f}"
                print(
                    f"| {name} | {decoder} | {size} | {sent * token / 2**20:.0f} | {sent / others:.2f} | "
                    f"{near * token / 2**20:.1f} | {by_heads} |"
                )


def deal(starts: tuple[int, ...], size: int, rank: int) -> Deal:
    """A deal that exchanges nothing."""
    return Deal(starts, size, rank, None, torch.device("cpu"))


def worst(values: list[int]) -> float:
    """Largest over mean."""
    return max(values) * len(values) / sum(values)


def step_seconds(directory: str, row: Any, size: int) -> tuple[float, int]:
    """On a rank: CPU seconds of forward and backward of one row, the least of 3; and which rank it is."""
    from megatron_vlm.testing.parity import wrapped_for_test
    from megatron_vlm.training.optimizer.build import OptimizerConfig
    from megatron_vlm.training.step import run_schedule

    parallel = {"context_parallel_size": size}
    model = wrapped_for_test(directory, parallel, {}, None, OptimizerConfig())[0]
    best = float("inf")
    for _ in range(3):
        model.stages[0].zero_grad_buffer()
        began = time.process_time()
        run_schedule(model, [row], forward_only=False)
        best = min(best, time.process_time() - began)
    return best, model.topology.cp_rank


def run(tokens: int) -> None:
    """Prints what a row of text costs each rank of cp 1 and cp 2: CPU seconds, operations, bytes that come and go."""
    from megatron_vlm.conversion.open_source import open_source
    from megatron_vlm.data.row import row_from_samples
    from megatron_vlm.testing.distributed import run_distributed
    from megatron_vlm.testing.parity import random_samples
    from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2

    with tempfile.TemporaryDirectory() as directory:
        sizes: dict[str, Any] = dict(text_hidden=256, ffn=688, max_positions=65536)
        write_tiny_idefics2(directory, text="llama", **sizes)
        with open_source(directory) as source:
            text = source.config.text
            samples = random_samples(source.config, [([], tokens * 5 // 8 - 1), ([], tokens * 3 // 8 - 1)])
        row = row_from_samples(samples, multiple_of=2)
        found = run_distributed(step_seconds, directory, row, 1, timeout=900)
        found += run_distributed(step_seconds, directory, row, 2, cp=2, timeout=900)
    starts, heads, width = (0, *accumulate(row.segments)), text.num_attention_heads, text.head_dim
    pair = 2 * text.num_query_groups * width * 4  # a key and a value in fp32
    projections = 2 * (heads + text.num_query_groups) * width + 3 * text.ffn_hidden_size
    linears = 2 * text.hidden_size * (text.num_layers * projections + text.vocab_size)
    print(
        f"A row of {starts[-1]} tokens, forward and backward\n\n| | CPU seconds | GFLOP | attention's share | MiB received | "
        "of all keys and values |\n| --- | --- | --- | --- | --- | --- |"
    )
    alone = (found[0][0], 0.0)
    for size, (seconds, rank) in zip((1, 2, 2), found):
        one = deal(starts, size, rank)
        # Three times the forward pass, and under context parallelism attention once more.
        attention = (3 + (size > 1)) * 4 * heads * width * text.num_layers * attention_work(starts, one.intervals[rank])
        work = attention + 3 * linears * starts[-1] / size
        alone = alone if alone[1] else (seconds, work)
        # Keys and values come, come again in the backward pass, and as many gradients of this rank's own.
        received = one.received_tokens(None) if size > 1 else 0
        print(
            f"| cp {size}, rank {rank} | {seconds:.2f} ({seconds / alone[0]:.2f}) | {work / 1e9:.1f} ({work / alone[1]:.2f}) | "
            f"{attention / work:.2f} | {3 * received * pair * text.num_layers / 2**20:.1f} | {received / starts[-1]:.2f} |"
        )


def data(scale: float) -> None:
    """Prints what the data path costs on one process, of files in the page cache; ``scale`` shortens the samples."""
    import numpy as np
    from PIL import Image

    from megatron_vlm import registry
    from megatron_vlm.data.config import DataConfig
    from megatron_vlm.data.formats import open_sources
    from megatron_vlm.data.shards.build import build_shards
    from megatron_vlm.data.stream.loader import RowLoader
    from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2

    draw, words = random.Random(0), ["zero", "one", "two", "three", "what", "is", "it", "a", "picture", "of", "number"]

    def text(count: int) -> str:
        return " ".join(draw.choices(words, k=max(1, count)))

    def record(name: str, turns: list[str], images: int = 0) -> dict[str, Any]:
        said = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
        return {
            "id": name,
            "conversations": said,
            **({"image": [f"{i % 64}.jpg" for i in range(images)]} if images else {}),
        }

    with tempfile.TemporaryDirectory() as directory:
        root, many = Path(directory), int(512 * scale)
        noise = np.random.default_rng(0)
        for i in range(64):
            Image.fromarray(noise.integers(0, 255, (980, 720, 3), dtype=np.uint8)).save(root / f"{i}.jpg", quality=90)
        marks = "".join("<image>\n" + text(30) for _ in range(many))
        records = [
            record("document", [text(int(135_000 * scale)), text(20)]),
            record("dialogue", [text(int(300 * scale)) for _ in range(400)]),
            record("album", [marks, text(50)], many),
            *(
                record(f"{i}", ["<image>\n" + text(100), text(draw.randint(20, 1500))], 1)
                for i in range(int(400 * scale))
            ),
        ]
        (root / "records.json").write_text(json.dumps(records))
        write_tiny_idefics2(root / "twin", text="llama")
        length = int(262_144 * scale)
        config = DataConfig(train=(str(root / "shards"),), seq_length=length, packing=True, num_workers=0)
        processor = registry.get("idefics2").open_processor(root / "twin", config)
        print(f"| at {length:,} tokens a row | CPU seconds | most memory so far, MiB |\n| --- | --- | --- |")
        sources = open_sources("llava", [root / "records.json"], root=str(root))
        took("build", lambda: build_shards(sources, root / "shards"))
        cut = config.replace(seq_length=int(100_000 * scale), on_too_long="truncate")
        short = registry.get("idefics2").open_processor(root / "twin", cut)
        sizes = dict(seed=1, global_batch_size=1, micro_batch_size=1, dp_rank=0, dp_size=1)
        took("count, cut to 100k", lambda: RowLoader(cut, short, paths=cut.train, **sizes).close())  # type: ignore[arg-type]
        loader = took("count", lambda: RowLoader(config, processor, paths=config.train, **sizes))  # type: ignore[arg-type]
        rows = round(loader.steps_per_epoch())
        found = took(f"plan, read and encode, {rows} rows", lambda: [loader.next_step().rows[0] for _ in range(rows)])
        loader.close()
        full = sum(row.num_tokens for row in found) / (rows * length)
    images = sum(len(row.pixels) for row in found)
    print(
        f"\n{rows} rows, {full:.1%} full, {images} images; the longest sample {max(max(row.segments) for row in found):,} tokens"
    )


def took(what: str, work: Callable[[], Made]) -> Made:
    """Prints a line of the table."""
    began = time.process_time()
    made = work()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"| {what} | {time.process_time() - began:.2f} | {most:.0f} |", flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="a small model on this machine's processors")
    parser.add_argument("--data", action="store_true", help="what the data path costs at 256k tokens a row")
    parser.add_argument("--scale", type=float, default=1.0, help="of the samples of --data")
    parser.add_argument("--tokens", type=int, default=8192, help="of the row that runs")
    arguments = parser.parse_args()
    if arguments.data:
        data(arguments.scale)
    elif arguments.run:
        run(arguments.tokens)
    else:
        balance()


if __name__ == "__main__":
    main()
