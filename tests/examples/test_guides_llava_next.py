"""docs/guides/llava_next.md on a tiny twin and digits: 100 steps halve the loss, transformers gives the same logits."""

import subprocess
import sys

import pytest
from PIL import Image

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.data.sample import Turn
from megatron_vlm.models.families.llava_next.processor import LlavaNextProcessor
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import hf_reference, layout_logits
from megatron_vlm.testing.runs import metrics_of
from megatron_vlm.testing.twins.llava_next import hf_inputs, write_tiny_llava_next
from tests.examples.guides import run_guide
from tests.examples.shell import EXAMPLES, ROOT, environment

STEPS = (
    "training.train_epochs=null training.train_iters=100 training.precision=fp32 data.seq_length=256 data.num_workers=1 "
    "optimizer.lr=3e-3 optimizer.lr_warmup_iters=5 checkpoint.save_interval=null"
)


@pytest.mark.slow
@pytest.mark.full
def test_guide(tmp_path):
    write_tiny_llava_next(tmp_path / "model", std=0.05, text=dict(max_position_embeddings=8192))
    make = [sys.executable, str(EXAMPLES / "quickstart" / "make_digits.py"), "--out", str(tmp_path / "digits")]
    subprocess.run(make, check=True, env=environment(), timeout=120)
    work = tmp_path / "work"
    output = run_guide(
        "llava_next.md",
        {"MODEL": tmp_path / "model", "DATA": tmp_path / "digits", "WORK": work},
        {"finetune_llava_next.sh": STEPS, "lora_llava_next.sh": STEPS.replace("100", "20")},
    )
    assert "world size 2 = tp 1 x pp 1 x dp 2" in output  # the dry run
    losses = [line["loss"] for line in metrics_of(work / "sft")]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert len(losses) == 100 and losses[-1] < losses[0] / 2
    assert len(metrics_of(work / "lora")) == 20

    # The export in transformers gives the logits of the training checkpoint.
    from transformers import LlavaNextForConditionalGeneration

    trained = LlavaNextForConditionalGeneration.from_pretrained(work / "hf", attn_implementation="eager").eval()
    processor = LlavaNextProcessor.from_pretrained(work / "hf", DataConfig(seq_length=256))
    image = Image.open(next((tmp_path / "digits" / "heldout").glob("*.png")))
    turns = [Turn(role="user", text="<image>\nWhat digit is this?"), Turn(role="assistant", text="seven")]
    sample = processor.encode("k", turns, [image])
    expected = hf_reference(trained, [sample], gradients=False, inputs=hf_inputs)[1]
    (ours,) = run_distributed(layout_logits, str(work / "sft"), [row_from_samples([sample])], {}, {})
    difference = float((ours["logits"][0] - expected).abs().max())
    print(f"logits {difference:.1e} of {float(expected.abs().max()):.1f}")
    assert difference <= 2e-5 * float(expected.abs().max())
    assert not (ROOT / "runs" / "llava_next").exists()
