"""A tiny model in two shards and raw records beside their pictures, as a user brings them to `launch`."""

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_vlm.cli.main import main
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2

SMALL = dict(text_hidden=32, ffn=48, vision_hidden=32, vision_ffn=40, vision_layers=2, depth=1, perceiver_head_dim=8)
COLOURS = ("red", "green", "blue", "white", "black")


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A whole HF checkpoint, its weights in several files with an index."""
    folder = tmp_path_factory.mktemp("model")
    write_tiny_idefics2(folder, std=0.15, layers=2, **SMALL).save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    return folder


def write_records(folder: Path, count: int) -> Path:
    """``count`` records about five pictures; returns the json file."""
    folder.mkdir(parents=True, exist_ok=True)
    for colour in COLOURS:
        Image.new("RGB", (30, 24), colour).save(folder / f"{colour}.png")
    records = []
    for number in range(count):
        colour = COLOURS[number % len(COLOURS)]
        turns = [{"from": "human", "value": "<image>Which one is it?"}, {"from": "gpt", "value": colour}]
        records.append({"id": str(number), "image": f"{colour}.png", "conversations": turns})
    path = folder / "train.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def launch(model, tmp_path, capfd):
    """``launch(*words) -> (exit code, output)`` of the command line's own function, into ``tmp_path / out``."""

    def run(*words: str, device: str | None = "cpu", source: Path = model) -> tuple[int, str]:
        base = (
            f"--load {source} --max_length 96 --shortest-edge 24 --learning_rate 1e-3 --output_dir {tmp_path / 'out'} "
            f"--shard_cache {tmp_path / 'cache'} --make-vocab-size-divisible-by 8 data.num_workers=0 --logging_steps 1 "
        )
        base += f"--device {device} " if device else ""
        code = main(["launch", *base.split(), *(word for text in words for word in text.split())])
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return run
