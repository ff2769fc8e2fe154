"""The main job, as the README gives it: a seventh of it by default; docs/numerics.md has the whole of it on three seeds."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from tests.examples.shell import EXAMPLES, environment, free_port, start

HELD_OUT = 0.90  # measured on seeds 0, 1, 2: see docs/numerics.md
HELD_OUT_LORA = 0.85  # measured 90.8 % on seed 0
HELD_OUT_EARLY = 0.35  # after a seventh of the updates; measured 51.1 % on seed 0
BLIND = 0.15


def answers(folder, *settings, **variables):
    """Share of right answers on held-out scans, by who gives them, as the script's last step writes it."""
    process = start("quickstart.sh", *settings, OUTPUT=folder, SEED=0, MASTER_PORT=free_port(), **variables)
    output = process.communicate(timeout=1500)[0]
    assert process.returncode == 0, output[-6000:]
    print(output[-700:])
    for picture in ("loss.png", "predictions.png"):
        with Image.open(folder / picture) as image:
            assert image.width > 400
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_a_seventh_of_the_quickstart(tmp_path):
    results = answers(tmp_path, "training.train_iters=100")
    assert results["this model"] >= HELD_OUT_EARLY
    assert results["blind: this model shown a grey picture"] < BLIND
    assert results["majority class"] < BLIND


@pytest.mark.full
def test_quickstart_reads_handwritten_digits(tmp_path):
    results = answers(tmp_path)
    assert results["this model"] >= HELD_OUT
    assert results["blind: this model shown a grey picture"] < BLIND


@pytest.mark.full
def test_adapters_read_handwritten_digits(tmp_path):
    """Adapters on the language model, a whole connector; the script itself compares PEFT's answers with the merged export's."""
    results = answers(tmp_path, LORA=1)
    assert results["this model"] >= HELD_OUT_LORA
    assert results["the adapter on its base, by PEFT"] == results["this model"]
    assert results["blind: this model shown a grey picture"] < BLIND


def test_held_out_scans_stay_out_of_training(tmp_path):
    """The data set that is trained on holds no held-out scan: not by name, and not by content."""
    script = [sys.executable, str(EXAMPLES / "quickstart" / "make_digits.py"), "--out", str(tmp_path)]
    subprocess.run(script, check=True, env=environment(), timeout=120)
    train = json.loads((tmp_path / "train.json").read_text())
    heldout = json.loads((tmp_path / "heldout.json").read_text())
    assert (len(train), len(heldout)) == (1437 * 9, 360)
    assert all(record["image"].startswith("train/") for record in train)
    seen = {(tmp_path / record["image"]).read_bytes() for record in train[:1437]}
    assert not seen & {(tmp_path / record["image"]).read_bytes() for record in heldout}
