"""Writes scikit-learn's handwritten digits as PNG files and LLaVA json: real scans, no download.

    load_digits (1,797 scans, in the package) --> OUT/train/*.png + OUT/train.json      first 1,437 scans
                                              --> OUT/heldout/*.png + OUT/heldout.json  last 360, most by other writers

Each training scan is written nine times: as it is, and shifted by one scan pixel in each direction.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "What digit is this?"
NUM_TRAIN = 1437
SIZE = 32  # pixels a side of the PNG; a scan has 8
SHIFTS = [(dx, dy) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
BLIND = Image.new("RGB", (SIZE, SIZE), (64, 64, 64))  # what the blind control sees in place of every scan


def picture(scan: np.ndarray, dx: int = 0, dy: int = 0) -> Image.Image:
    """Returns a scan (8 x 8, values 0 to 16) shifted by whole scan pixels, dark where it was shifted away, as RGB."""
    padded = np.pad(scan, 1)[1 - dy : 9 - dy, 1 - dx : 9 - dx]
    grey = Image.fromarray((padded * (255 / 16)).round().astype(np.uint8))
    return grey.resize((SIZE, SIZE), Image.Resampling.BILINEAR).convert("RGB")


def record(key: str, image: str, digit: int) -> dict:
    """One LLaVA record."""
    turns = [{"from": "human", "value": f"<image>{QUESTION}"}, {"from": "gpt", "value": WORDS[digit]}]
    return {"id": key, "image": image, "conversations": turns}


def main() -> None:
    """Writes both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--blind", action="store_true", help="one grey picture for every training scan")
    out, blind = (args := parser.parse_args()).out, args.blind
    digits = load_digits()
    records = {"train": [], "heldout": []}
    for number, (scan, digit) in enumerate(zip(digits.images, digits.target)):
        part = "train" if number < NUM_TRAIN else "heldout"
        (out / part).mkdir(parents=True, exist_ok=True)
        for dx, dy in SHIFTS if part == "train" else [(0, 0)]:
            name = f"{part}/{number:04d}_{dx + 1}{dy + 1}"
            image = BLIND if blind and part == "train" else picture(scan, dx, dy)
            image.save(out / f"{name}.png")
            records[part].append(record(name, f"{name}.png", int(digit)))
    for part, items in records.items():
        (out / f"{part}.json").write_text(json.dumps(items, indent=1), encoding="utf-8")
        print(f"{part}: {len(items)} pictures of {len(items) // (len(SHIFTS) if part == 'train' else 1)} scans")


if __name__ == "__main__":
    main()
