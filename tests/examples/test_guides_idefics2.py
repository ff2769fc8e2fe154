"""docs/guides/idefics2.md on tiny twins and handwritten digits."""

import json
import subprocess
import sys

import pytest

from megatron_vlm.testing.runs import metrics_of
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from tests.examples.guides import run_guide
from tests.examples.shell import EXAMPLES, environment

FEW = (
    "training.train_epochs=null training.train_iters=4 training.precision=fp32 training.global_batch_size=2 "
    "data.seq_length=1024 data.num_workers=0 checkpoint.save_interval=null"
)


@pytest.mark.slow
@pytest.mark.full
def test_guide(tmp_path, llm, vision):
    write_tiny_idefics2(tmp_path / "model", std=0.05)
    make = [sys.executable, str(EXAMPLES / "quickstart" / "make_digits.py"), "--out", str(tmp_path / "digits")]
    subprocess.run(make, check=True, env=environment(), timeout=120)
    records = json.loads((tmp_path / "digits" / "train.json").read_text())[:400]
    (tmp_path / "records.json").write_text(json.dumps(records))
    work = tmp_path / "work"
    run_guide(
        "idefics2.md",
        {
            "MODEL": tmp_path / "model",
            "RECORDS": tmp_path / "records.json",
            "IMAGES": tmp_path / "digits",
            "PICTURE": tmp_path / "digits" / records[0]["image"],
            "WORK": work,
            "LLM": llm,
            "VISION": vision,
        },
        dict.fromkeys(("finetune_idefics2.sh", "pretrain_idefics2_llama3.sh", "finetune_idefics2_llama3.sh"), FEW),
    )
    lines = {name: metrics_of(work / name) for name in ("sft", "split", "one", "two")}
    assert all(len(found) == 4 for found in lines.values())
    # Five views of each image, five times the image tokens: fewer samples a row, more images.
    assert lines["split"][0]["images"] > lines["sft"][0]["images"]
