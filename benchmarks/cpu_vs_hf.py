"""This trainer's step against a hand-written transformers loop, on the CPU, in turn in one run.

    python benchmarks/cpu_vs_hf.py [--steps 8] [--threads 1] [--text mistral] [--fused]

Both train the same 30M-parameter Idefics2 from the same weights on the same batches in fp32, AdamW and clipping
included: ours through megatron-core's schedule, DDP and optimizer on packed rows, the other as users write it, with
sdpa and padding. Counted are CPU seconds of the process: a busy machine lengthens them less than the clock's.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_vlm.conversion.load import load_into
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.data.row import IGNORE_INDEX, EncodedSample, row_from_samples
from megatron_vlm.models.built import build_model
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.parallel import cpu
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.topology import build_topology, init_process_group
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.training.optimizer.build import build_optimizer, set_learning_rates, wrap_model
from megatron_vlm.training.optimizer.config import OptimizerConfig
from megatron_vlm.training.step import train_step

MODEL = dict(
    text_hidden=384, ffn=1152, layers=8, heads=6, kv_heads=2, vocab_size=8192, max_positions=4096,
    vision_hidden=288, vision_ffn=1152, vision_layers=6, vision_heads=4, image_size=224, patch_size=14,
    latents=16, depth=2, perceiver_heads=6, perceiver_kv_heads=2, perceiver_head_dim=64,
)  # fmt: skip
SEED = 7
BATCH = 8  # samples of a step
ROW = 4096  # most tokens of a packed row
OPTIMIZER = OptimizerConfig(lr=1e-4, lr_decay_style="constant", weight_decay=0.0, adam_beta2=0.95, clip_grad=1.0)
BAR_EQUAL, BAR_MIXED = 1.15, 0.85


@dataclass
class Tally:
    """What one loop did on one kind of batches."""

    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def make_samples(kind: str, number: int, latents: int, image_token: int, seed: int) -> list[EncodedSample]:
    """Makes random samples: ``equal`` has 256 tokens and one 112 x 112 image each; ``mixed`` has log-normal text of 50
    to 2000 tokens (median 200) and none to two images of 56 to 224 pixels a side."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    samples = []
    for index in range(number):
        if kind == "equal":
            length, sizes = 256, [(112, 112)]
        else:
            text = int(torch.empty(()).log_normal_(5.3, 1.0, generator=generator).clamp(50, 2000))
            sizes = [(14 * draw(4, 16), 14 * draw(4, 16)) for _ in range(draw(0, 2))]
            length = text + len(sizes) * latents
        ids = torch.randint(1000, 8000, (length,), generator=generator)
        positions = torch.arange(4, 4 + len(sizes) * latents)
        ids[positions] = image_token
        labels = ids.clone()
        labels[: 4 + len(positions)] = IGNORE_INDEX
        pixels = tuple(torch.randn(3, height, width, generator=generator) for height, width in sizes)
        key = f"{kind}-{index}"
        samples.append(EncodedSample(key=key, input_ids=ids, labels=labels, pixels=pixels, image_positions=positions))
    return samples


def our_step(model_dir: Path, fused: bool) -> Callable[[Sequence[EncodedSample]], float]:
    """Builds our model, optimizer and schedule on one process; returns a function that trains on one batch."""
    cpu.install()
    device = torch.device("cpu")
    init_process_group(device)
    source = open_source(str(model_dir))
    config = source.config
    topology = build_topology(ParallelConfig(), num_layers=config.text.num_layers, device=device)
    model = build_model(source.spec, config, topology, ModelOptions(transformer_impl="fused" if fused else "local"))
    load_into(source, model)
    model = wrap_model(model, ParallelConfig())
    optimizer = build_optimizer(dataclasses.replace(OPTIMIZER, fused=fused or None), model)
    set_learning_rates(optimizer, dict.fromkeys(("llm", "vision", "connector"), OPTIMIZER.lr), 0.0)

    def step(samples: Sequence[EncodedSample]) -> float:
        return train_step(model, optimizer, [row_from_samples(row) for row in pack(samples)]).loss

    return step


def pack(samples: Sequence[EncodedSample], most: int = ROW) -> list[list[EncodedSample]]:
    """Fills rows of at most ``most`` tokens, first fit by falling length."""
    rows: list[list[EncodedSample]] = []
    for sample in sorted(samples, key=lambda s: -len(s.input_ids)):
        fits = (row for row in rows if sum(len(s.input_ids) for s in row) + len(sample.input_ids) <= most)
        row = next(fits, None)
        if row is None:
            rows.append(row := [])
        row.append(sample)
    return rows


def hf_step(model_dir: Path) -> Callable[[Sequence[EncodedSample]], float]:
    """Loads the model with transformers (sdpa); returns a function that trains on one padded batch."""
    from transformers import Idefics2ForConditionalGeneration

    model = Idefics2ForConditionalGeneration.from_pretrained(model_dir, attn_implementation="sdpa").train()
    betas = (OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2)
    optimizer = torch.optim.AdamW(model.parameters(), OPTIMIZER.lr, betas, OPTIMIZER.adam_eps, weight_decay=0.0)

    def step(samples: Sequence[EncodedSample]) -> float:
        optimizer.zero_grad()
        loss = model(**padded(samples)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
        optimizer.step()
        return loss.item()

    return step


def padded(samples: Sequence[EncodedSample], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The batch as transformers wants it: texts padded to the longest, images to the largest and to the most, in ``dtype``."""
    length = max(len(s.input_ids) for s in samples)
    ids, mask = torch.zeros(len(samples), length, dtype=torch.long), torch.zeros(len(samples), length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for i, sample in enumerate(samples):
        n = len(sample.input_ids)
        ids[i, :n], labels[i, :n], mask[i, :n] = sample.input_ids, sample.labels, 1
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    images = [image for sample in samples for image in sample.pixels]
    if images:
        most = max(len(s.pixels) for s in samples)
        height, width = max(p.shape[1] for p in images), max(p.shape[2] for p in images)
        batch["pixel_values"] = torch.zeros(len(samples), most, 3, height, width, dtype=dtype)
        batch["pixel_attention_mask"] = torch.zeros(len(samples), most, height, width, dtype=torch.long)
        for i, sample in enumerate(samples):
            for j, image in enumerate(sample.pixels):
                batch["pixel_values"][i, j, :, : image.shape[1], : image.shape[2]] = image
                batch["pixel_attention_mask"][i, j, : image.shape[1], : image.shape[2]] = 1
    return batch


def compare(
    kind: str, loops: dict[str, Callable], batches: list[list[EncodedSample]], warm_up: int
) -> dict[str, float]:
    """Runs both loops in turn over the batches and returns the numbers of the table."""
    tallies = {name: Tally() for name in loops}
    for number, batch in enumerate(batches):
        order = list(loops) if number % 2 == 0 else list(loops)[::-1]
        for name in order:
            start = time.process_time()
            tallies[name].losses.append(loops[name](batch))
            tallies[name].cpu_seconds.append(time.process_time() - start)
    timed = slice(warm_up, None)
    tokens = sum(len(s.input_ids) for batch in batches[timed] for s in batch)
    slots = sum(len(batch) * max(len(s.input_ids) for s in batch) for batch in batches[timed])
    numbers = {"fill": tokens / slots}
    for name, tally in tallies.items():
        numbers[f"{name} s/step"] = statistics.median(tally.cpu_seconds[timed])
        numbers[f"{name} tokens/s"] = tokens / sum(tally.cpu_seconds[timed])
    ours, theirs = (tallies[name].losses for name in ("ours", "hf"))
    numbers["loss difference"] = max(abs(a - b) / b for a, b in zip(ours, theirs))
    per_step = " ".join(f"{abs(a - b):.1e}" for a, b in zip(ours, theirs))
    print(f"{kind}: |loss difference| by step: {per_step}", flush=True)
    return numbers


def main() -> None:
    """Runs both kinds of batches and prints the table with the bars."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each loop and kind")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=("equal", "mixed"), default=["equal", "mixed"])
    parser.add_argument(
        "--fused", action="store_true", help="ours with transformer_impl=fused and optimizer.fused=true"
    )
    parser.add_argument("--text", choices=("mistral", "llama"), default="mistral")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        model = write_tiny_idefics2(directory, args.text, std=0.02, **MODEL)
        parameters, image_token = sum(p.numel() for p in model.parameters()), model.config.image_token_id
        del model
        loops = {"ours": our_step(Path(directory), args.fused), "hf": hf_step(Path(directory))}
    print(f"{parameters / 1e6:.1f}M parameters, {BATCH} samples a step, fp32, {args.threads} thread(s), seed {SEED}")
    results = {}
    for kind in args.kinds:
        number = args.steps + args.warm_up
        samples = make_samples(kind, number * BATCH, MODEL["latents"], image_token, SEED)
        batches = [samples[i * BATCH : (i + 1) * BATCH] for i in range(number)]
        results[kind] = compare(kind, loops, batches, args.warm_up)
    print(
        "\n| lengths | ours CPU-s/step | HF CPU-s/step | ours tokens/CPU-s | HF tokens/CPU-s | HF fill | ratio | bar |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    passed = True
    for kind, n in results.items():
        cost, speed = n["ours s/step"] / n["hf s/step"], n["ours tokens/s"] / n["hf tokens/s"]
        good = cost <= BAR_EQUAL if kind == "equal" else speed >= BAR_MIXED / n["fill"]
        bar = (
            f"cost <= {BAR_EQUAL}" if kind == "equal" else f"speed >= {BAR_MIXED / n['fill']:.2f} = {BAR_MIXED} / fill"
        )
        ratio = f"cost {cost:.2f}" if kind == "equal" else f"speed {speed:.2f}"
        passed = passed and good
        row = [
            f"{n['ours s/step']:.2f}",
            f"{n['hf s/step']:.2f}",
            f"{n['ours tokens/s']:.0f}",
            f"{n['hf tokens/s']:.0f}",
        ]
        row += [f"{n['fill']:.2f}", ratio, f"{bar}: {'met' if good else 'NOT MET'}"]
        print(f"| {kind} | {' | '.join(row)} |")
    print(f"\nlargest relative loss difference: {max(n['loss difference'] for n in results.values()):.1e}")
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
