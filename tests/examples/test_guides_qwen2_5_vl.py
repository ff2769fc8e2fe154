"""docs/guides/qwen2_5_vl.md on a tiny twin and digits: adapters lower the loss, transformers gives the merged model's logits."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.data.sample import Turn
from megatron_vlm.models.families.qwen2_5_vl.processor import Qwen25VLProcessor
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import hf_reference, layout_logits
from megatron_vlm.testing.runs import metrics_of
from megatron_vlm.testing.twins.qwen2_5_vl import inputs_of, write_tiny_qwen2_5_vl
from tests.examples.guides import run_guide
from tests.examples.shell import EXAMPLES, environment

STEPS = (
    "training.train_epochs=null training.train_iters=40 training.precision=fp32 data.seq_length=256 data.num_workers=1 "
    "data.min_pixels=512 data.max_pixels=6144 optimizer.lr=1e-2 training.global_batch_size=4 checkpoint.save_interval=null"
)


@pytest.mark.slow
@pytest.mark.full
def test_guide(tmp_path):
    write_tiny_qwen2_5_vl(tmp_path / "model", std=0.05, text=dict(max_position_embeddings=8192))
    make = [sys.executable, str(EXAMPLES / "quickstart" / "make_digits.py"), "--out", str(tmp_path / "digits")]
    subprocess.run(make, check=True, env=environment(), timeout=120)
    work = tmp_path / "work"
    values = {
        "MODEL": tmp_path / "model",
        "INPUT": tmp_path / "digits/train.json",
        "IMAGES": tmp_path / "digits",
        "WORK": work,
    }
    output = run_guide("qwen2_5_vl.md", values, {"lora_qwen2_5_vl.sh": STEPS})
    assert "world size 8 = tp 4 x pp 1 x dp 2" in output  # the dry run
    losses = [line["loss"] for line in metrics_of(work / "lora")]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert len(losses) == 40 and losses[-1] < 0.8 * losses[0]

    from transformers import Qwen2_5_VLForConditionalGeneration

    merged = Qwen2_5_VLForConditionalGeneration.from_pretrained(work / "hf", attn_implementation="eager").eval()
    processor = Qwen25VLProcessor.from_pretrained(work / "hf", DataConfig(seq_length=256))
    assert (processor.min_pixels, processor.max_pixels) == (512, 6144)  # the run's
    image = Image.open(next((tmp_path / "digits" / "heldout").glob("*.png")))
    turns = [Turn(role="user", text="<image>What digit is this?"), Turn(role="assistant", text="seven")]
    sample = processor.encode("k", turns, [image])
    inputs = inputs_of(json.loads((work / "hf" / "config.json").read_text()))
    expected = hf_reference(merged, [sample], gradients=False, inputs=inputs)[1]
    (ours,) = run_distributed(layout_logits, str(work / "lora"), [row_from_samples([sample])], {}, {})
    assert float((ours["logits"][0] - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
