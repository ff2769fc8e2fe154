"""Writes scikit-learn's handwritten digits as PNG files and LLaVA json: real scans, no download.

    load_digits (1,797 scans, in the package) --> OUT/train/*.png + OUT/train.json      first 1,437 scans
                                              --> OUT/heldout/*.png + OUT/heldout.json  last 360, mostly other writers

Each training scan is written nine times: as it is, and eight times slightly turned, scaled and shifted.
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
COPIES = 9
TURN, SCALE, SHIFT = 10.0, 0.08, 2.0  # largest change of a copy: degrees, share, pixels of the PNG
BLIND = Image.new("RGB", (SIZE, SIZE), (64, 64, 64))  # what the blind control sees in place of every scan


def picture(scan: np.ndarray) -> Image.Image:
    """Returns a scan (8 x 8, values 0 to 16) as a grey picture."""
    grey = Image.fromarray((scan * (255 / 16)).round().astype(np.uint8))
    return grey.resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def varied(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Returns the picture turned, scaled and shifted a little at random about its centre."""
    angle = np.deg2rad(generator.uniform(-TURN, TURN))
    zoom = 1 / generator.uniform(1 - SCALE, 1 + SCALE)
    centre = (SIZE - 1) / 2
    x, y = centre + generator.uniform(-SHIFT, SHIFT, 2)
    cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
    affine = (cos, -sin, centre - cos * x + sin * y, sin, cos, centre - sin * x - cos * y)
    return image.transform((SIZE, SIZE), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)


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
    digits, generator = load_digits(), np.random.default_rng(0)
    for part, numbers, copies in (
        ("train", range(NUM_TRAIN), COPIES),
        ("heldout", range(NUM_TRAIN, len(digits.images)), 1),
    ):
        (out / part).mkdir(parents=True, exist_ok=True)
        records = []
        for copy in range(copies):
            for number in numbers:
                image = picture(digits.images[number])
                image = varied(image, generator) if copy else image
                name = f"{part}/{number:04d}_{copy}"
                (BLIND if blind and part == "train" else image.convert("RGB")).save(out / f"{name}.png")
                records.append(record(name, f"{name}.png", int(digits.target[number])))
        (out / f"{part}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
        print(f"{part}: {len(records)} pictures of {len(numbers)} scans")


if __name__ == "__main__":
    main()
