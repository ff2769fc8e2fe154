"""How full packed rows are, and what packing is worth against padded batches.

    python benchmarks/packing.py [fill] [train] [--steps 6] [--threads 1]

*fill*: real tokens / (rows x 4096), of log-normal lengths from 50 to 2000 tokens and of a real mix: the digits of
scikit-learn as images with a question, beside the docstrings of Python's and NumPy's functions as text, built into shards
and planned as a run plans them. *train*: real tokens per CPU second of training on packed rows against transformers on
batches padded to their longest sample (cpu_vs_hf.py's model, loops and mixed lengths).
"""

import argparse
import inspect
import json
import pkgutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.formats import open_sources
from megatron_vlm.data.shards.build import build_shards
from megatron_vlm.data.stream.loader import open_data
from megatron_vlm.data.stream.packing import best_fit
from megatron_vlm.models.families.idefics2.processor import Idefics2Processor
from megatron_vlm.testing.twins.idefics2 import tiny_idefics2_config, tiny_tokenizer

ROW, WINDOW = 4096, 4096
FILL_BAR = 0.97
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def log_normal_fill(seeds: int = 5) -> list[float]:
    """Fill of rows planned for windows of log-normal lengths (median 300, between 50 and 2000)."""
    fills = []
    for seed in range(seeds):
        values = np.exp(np.random.default_rng(seed).normal(np.log(300), 0.9, WINDOW))
        lengths = values.clip(50, 2000).astype(np.int64)
        fills.append(float(lengths.sum() / (len(best_fit(lengths, ROW)) * ROW)))
    return fills


def real_mix_fill(folder: Path) -> dict[str, float]:
    """Builds the real mix in ``folder`` and returns samples, shares and the fill of an epoch's rows."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    records = []
    for index, (scan, target) in enumerate(zip(digits.images, digits.target)):
        Image.fromarray((scan * 15).astype(np.uint8)).resize((224, 224)).save(folder / f"{index}.png")
        turns = [("human", "<image>\nWhich digit is this?"), ("gpt", NAMES[target])]
        records.append({"image": f"{index}.png", "conversations": [{"from": f, "value": v} for f, v in turns]})
    (folder / "digits.json").write_text(json.dumps(records))
    with (folder / "text.jsonl").open("w") as file:
        for name, text in docstrings():
            turns = [{"role": "user", "content": f"What does {name} do?"}, {"role": "assistant", "content": text}]
            file.write(json.dumps({"messages": turns}) + "\n")
    for kind, format in (("digits.json", "llava"), ("text.jsonl", "openai")):
        build_shards(open_sources(format, [folder / kind], root=str(folder)), folder / Path(kind).stem)
    model = folder / "model"
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(model)
    config = tiny_idefics2_config(tokenizer).to_dict()
    config["perceiver_config"]["resampler_n_latents"] = 64
    (model / "config.json").write_text(json.dumps(config))
    settings = {"image_seq_len": 64, "image_processor": {"size": {"longest_edge": 224, "shortest_edge": 112}}}
    (model / "processor_config.json").write_text(json.dumps(settings))
    data = DataConfig(seq_length=ROW, packing=True, on_too_long="drop", num_workers=0)
    opened = open_data(
        data, Idefics2Processor.from_pretrained(model, data), [folder / "digits", folder / "text"], seed=1
    )
    rows = [item for window in range(opened.stream.num_windows) for item in opened.stream.window(0, window)]
    tokens = np.array([n for item in rows for n in item.tokens])
    return {
        "samples": len(tokens),
        "images": len(digits.images),
        "shortest": int(tokens.min()),
        "median": float(np.median(tokens)),
        "longest": int(tokens.max()),
        "rows": len(rows),
        "fill": float(tokens.sum() / (len(rows) * ROW)),
    }


def docstrings() -> Iterator[tuple[str, str]]:
    """Yields (name, docstring) of public functions and classes of NumPy and of the standard library."""
    modules = ["numpy", "numpy.linalg", "numpy.fft", "numpy.random", "numpy.ma"]
    skip = {"antigravity", "this", "idlelib", "lib2to3", "tkinter", "turtle", "turtledemo", "test", "distutils"}
    modules += sorted(m.name for m in pkgutil.iter_modules([str(Path(inspect.__file__).parent)]) if m.name not in skip)
    seen = set()
    for module_name in modules:
        if module_name.startswith("_"):
            continue
        try:
            module = __import__(module_name, fromlist=["_"])
        except ImportError:
            continue
        for name, value in sorted(vars(module).items()):
            text = inspect.getdoc(value) if callable(value) and not name.startswith("_") else None
            if text and text.strip() and "<image>" not in text and text not in seen:
                seen.add(text)
                yield f"{module_name}.{name}", text


def fill() -> bool:
    """Prints the table of fills; returns whether the bar is met."""
    values = log_normal_fill()
    with tempfile.TemporaryDirectory() as name:
        mix = real_mix_fill(Path(name))
    print(f"| lengths | samples | rows of {ROW} | fill | bar |\n| --- | --- | --- | --- | --- |")
    good = [min(values) >= FILL_BAR, mix["fill"] >= FILL_BAR]
    words = [f"at least {FILL_BAR:.0%}: {'met' if met else 'NOT MET'}" for met in good]
    print(f"| log-normal 50 to 2000 | {len(values)} windows of {WINDOW} | | {min(values):.2%} at worst | {words[0]} |")
    kind = f"real mix, {mix['images']} with an image; {mix['shortest']} to {mix['longest']} tokens, median {mix['median']:.0f}"
    print(f"| {kind} | {mix['samples']} | {mix['rows']} | {mix['fill']:.2%} | {words[1]} |")
    return all(good)


def train(steps: int, threads: int) -> bool:
    """Prints the comparison with padded batches; returns whether the bar is met."""
    import cpu_vs_hf as loops

    from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        model = write_tiny_idefics2(name, "mistral", std=0.02, **loops.MODEL)
        token = model.config.image_token_id
        del model
        both = {"ours": loops.our_step(Path(name)), "hf": loops.hf_step(Path(name))}
    number = steps + 1
    samples = loops.make_samples("mixed", number * loops.BATCH, loops.MODEL["latents"], token, loops.SEED)
    batches = [samples[i * loops.BATCH : (i + 1) * loops.BATCH] for i in range(number)]
    figures = loops.compare("mixed", both, batches, 1)
    ratio, bar = figures["ours tokens/s"] / figures["hf tokens/s"], loops.BAR_MIXED / figures["fill"]
    print("| fill of padded batches | packed, tokens/CPU-s | padded, tokens/CPU-s | ratio | bar |")
    print("| --- | --- | --- | --- | --- |")
    met = f"at least {bar:.2f} = {loops.BAR_MIXED} / fill: {'met' if ratio >= bar else 'NOT MET'}"
    speeds = f"{figures['ours tokens/s']:.0f} | {figures['hf tokens/s']:.0f}"
    print(f"| {figures['fill']:.2f} | {speeds} | {ratio:.2f} | {met} |")
    return ratio >= bar


def main() -> int:
    """Runs what is asked for; exit 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("parts", nargs="*", help="fill, train (default: both)")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    parts = args.parts or ["fill", "train"]
    results = [fill() if part == "fill" else train(args.steps, args.threads) for part in parts]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
