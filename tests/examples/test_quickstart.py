"""The main job, as the README gives it: one seed here; docs/numerics.md has three."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from tests.examples.shell import EXAMPLES, environment, free_port, start

HELD_OUT = 0.90  # measured on seeds 0, 1, 2: see docs/numerics.md
BLIND = 0.15


@pytest.mark.slow
def test_quickstart_reads_handwritten_digits(tmp_path):
    process = start("quickstart.sh", OUTPUT=tmp_path, SEED=0, MASTER_PORT=free_port())
    output = process.communicate(timeout=1500)[0]
    assert process.returncode == 0, output[-6000:]
    results = json.loads((tmp_path / "results.json").read_text())
    print(output[-700:])
    assert results["this model"] >= HELD_OUT
    assert results["blind: this model shown a grey picture"] < BLIND
    assert results["majority class"] < BLIND
    for picture in ("loss.png", "predictions.png"):
        with Image.open(tmp_path / picture) as image:
            assert image.width > 400


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
