"""Reads the export with plain transformers, generates an answer for every held-out scan, and prints it beside controls.

The only step that opens the held-out scans. Writes OUT/loss.png, OUT/predictions.png and OUT/results.json. With --adapter,
PEFT puts the adapter on its base, and its answers must be those of the merged export, or the exit code is 1.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import matplotlib
import torch
from make_digits import BLIND, NUM_TRAIN, QUESTION
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from transformers import AutoProcessor, Idefics2ForConditionalGeneration

from megatron_vlm.training.metrics.run_files import RunFiles, smoothed

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH = 60
GRID = (6, 12)


def load(folder: Path) -> torch.nn.Module:
    """Returns the model of an export, or PEFT's of an adapter on the base that it names."""
    if (folder / "adapter_config.json").exists():
        from peft import AutoPeftModel

        return AutoPeftModel.from_pretrained(folder, dtype=torch.float32).eval()
    return Idefics2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def answers(folder: Path, images: list[Image.Image]) -> list[str]:
    """Returns the model's greedy answer to the question for each image."""
    processor = AutoProcessor.from_pretrained(folder)
    model = load(folder)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    texts = []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        inputs = processor(text=[prompt] * len(batch), images=[[image] for image in batch], return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        texts += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return texts


def exact(given: list[str], truth: list[str]) -> float:
    """Share of answers that are the truth to the letter."""
    return sum(a == b for a, b in zip(given, truth, strict=True)) / len(truth)


def pixel_baseline() -> float:
    """Held-out accuracy of a logistic regression on the 64 pixel values, trained on the same scans."""
    digits = load_digits()
    pixels = digits.data / 16.0
    model = LogisticRegression(max_iter=2000).fit(pixels[:NUM_TRAIN], digits.target[:NUM_TRAIN])
    return float(model.score(pixels[NUM_TRAIN:], digits.target[NUM_TRAIN:]))


def draw_predictions(path: Path, images: list[Image.Image], given: list[str], truth: list[str]) -> None:
    """Draws a grid of scans with the answers over them: every mistake first, crossed and framed, then scans in order."""
    rows, columns = GRID
    wrong = [i for i in range(len(truth)) if given[i] != truth[i]][: rows * columns // 3]
    chosen = (wrong + [i for i in range(len(truth)) if i not in set(wrong)])[: rows * columns]
    figure, axes = plt.subplots(rows, columns, figsize=(1.15 * columns, 1.6 * rows), layout="constrained")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, i in zip(axes.flat, chosen):
        axis.imshow(images[i])
        right = given[i] == truth[i]
        title = f"\N{CHECK MARK} {given[i][:10]}\n" if right else f"\N{BALLOT X} {given[i][:10]}\n({truth[i]})"
        axis.set_title(title, fontsize=8, color="green" if right else "red", fontweight="normal" if right else "bold")
        if not right:  # a frame too: green and red are one colour to many
            axis.spines[:].set(visible=True, color="red", linewidth=2)
    figure.suptitle(
        f"Held-out scans and the model's answers: {exact(given, truth):.1%} right (mistakes first, truth in brackets)"
    )
    figure.savefig(path, dpi=110)


def draw_loss(path: Path, metrics: Path) -> None:
    """Draws the loss of metrics.jsonl: each step, smoothed, and of held-out data where the run evaluated."""
    run = RunFiles.read(metrics.parent)
    steps, held_out = run.series("loss"), run.series("eval_loss")
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.semilogy(*zip(*steps), linewidth=0.6, alpha=0.35, color="C0", label="each step")
    axis.semilogy([x for x, _ in steps], smoothed([y for _, y in steps]), linewidth=1.8, color="C0", label="smoothed")
    if held_out:
        axis.semilogy(*zip(*held_out), marker="D", linestyle="--", color="C1", label="held-out data")
    axis.set(xlabel="iteration", ylabel="loss per answer token", title="Quickstart: training loss")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Evaluates, draws, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="exported HF checkpoint")
    parser.add_argument("--blind-model", type=Path, help="export of the same recipe trained on one grey picture")
    parser.add_argument("--adapter", type=Path, help="PEFT adapter that the export was merged from")
    parser.add_argument("--digits", type=Path, required=True, help="folder that make_digits.py wrote")
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.jsonl of the run")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    heldout = json.loads((args.digits / "heldout.json").read_text(encoding="utf-8"))
    train = json.loads((args.digits / "train.json").read_text(encoding="utf-8"))
    truth = [item["conversations"][1]["value"] for item in heldout]
    majority = Counter(item["conversations"][1]["value"] for item in train).most_common(1)[0][0]
    images = [Image.open(args.digits / item["image"]).convert("RGB") for item in heldout]
    given = answers(args.model, images)
    adapted = answers(args.adapter, images) if args.adapter else given
    grey = [BLIND] * len(images)
    results = {
        "this model": exact(given, truth),
        "majority class": exact([majority] * len(truth), truth),
        "blind: this model shown a grey picture": exact(answers(args.model, grey), truth),
        "logistic regression on pixels": pixel_baseline(),
    }
    if args.adapter:
        results["the adapter on its base, by PEFT"] = exact(adapted, truth)
    if args.blind_model:
        results["blind: trained and shown grey pictures"] = exact(answers(args.blind_model, grey), truth)
    args.out.mkdir(parents=True, exist_ok=True)
    draw_predictions(args.out / "predictions.png", images, given, truth)
    draw_loss(args.out / "loss.png", args.metrics)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\nexact answers on {len(truth)} held-out scans")
    for name, value in results.items():
        print(f"  {name:<40} {value:6.1%}")
    print(f"pictures: {args.out / 'loss.png'}, {args.out / 'predictions.png'}")
    differing = sum(a != b for a, b in zip(adapted, given, strict=True))
    if differing:
        raise SystemExit(
            f"the adapter on its base answers {differing} of {len(truth)} scans otherwise than the merged export"
        )


if __name__ == "__main__":
    main()
