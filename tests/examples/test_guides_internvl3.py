"""docs/guides/internvl3.md on a tiny twin and digits: 100 steps halve the loss, transformers gives the same logits."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.data.sample import Turn
from megatron_vlm.models.families.internvl3.processor import InternVL3Processor
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import hf_reference, layout_logits
from megatron_vlm.testing.runs import metrics_of
from megatron_vlm.testing.twins.internvl3 import hf_inputs, write_chat_layout, write_tiny_internvl3
from tests.examples.guides import run_guide
from tests.examples.shell import EXAMPLES, ROOT, environment

STEPS = (
    "training.train_epochs=null training.train_iters=100 training.precision=fp32 data.seq_length=256 data.num_workers=1 "
    "optimizer.lr=3e-3 training.global_batch_size=16 training.micro_batch_size=16 checkpoint.save_interval=null"
)


@pytest.mark.slow
@pytest.mark.full
def test_guide(tmp_path):
    model = write_tiny_internvl3(tmp_path / "native", std=0.05)
    write_chat_layout(tmp_path / "model", model)
    make = [sys.executable, str(EXAMPLES / "quickstart" / "make_digits.py"), "--out", str(tmp_path / "digits")]
    subprocess.run(make, check=True, env=environment(), timeout=120)
    records = json.loads((tmp_path / "digits" / "train.json").read_text())[:1437]
    (tmp_path / "digits.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    entry = {"root": str(tmp_path / "digits"), "annotation": str(tmp_path / "digits.jsonl"), "data_augment": True}
    (tmp_path / "meta.json").write_text(json.dumps({"digits": {**entry, "repeat_time": 3, "max_dynamic_patch": 6}}))

    work = tmp_path / "work"
    output = run_guide(
        "internvl3.md",
        {"MODEL": tmp_path / "model", "META": tmp_path / "meta.json", "WORK": work},
        {"finetune_internvl3.sh": STEPS},
    )
    assert "world size 8 = tp 4 x pp 1 x dp 2" in output  # the dry run
    losses = [line["loss"] for line in metrics_of(work / "sft")]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert len(losses) == 100 and losses[-1] < losses[0] / 2

    # The export in transformers gives the logits of the training checkpoint.
    from transformers import InternVLForConditionalGeneration

    trained = InternVLForConditionalGeneration.from_pretrained(work / "hf", attn_implementation="eager").eval()
    processor = InternVL3Processor.from_pretrained(work / "hf", DataConfig(seq_length=256))
    image = Image.open(next((tmp_path / "digits" / "heldout").glob("*.png")))
    turns = [Turn(role="user", text="<image>What digit is this?"), Turn(role="assistant", text="seven")]
    sample = processor.encode("k", turns, [image])
    expected = hf_reference(trained, [sample], gradients=False, inputs=hf_inputs)[1]
    (ours,) = run_distributed(layout_logits, str(work / "sft"), [row_from_samples([sample])], {}, {})
    difference = float((ours["logits"][0] - expected).abs().max())
    print(f"logits {difference:.1e} of {float(expected.abs().max()):.1f}")
    assert difference <= 1e-5 * float(expected.abs().max())
    config = json.loads((work / "chat" / "config.json").read_text())
    assert config["model_type"] == "internvl_chat" and not (ROOT / "runs" / "internvl3").exists()
    assert torch.isfinite(expected).all()
