"""docs/guides/llava_internlm2.md on tiny parts and digits: 100 steps halve the loss, transformers gives the same logits."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megatron_vlm import registry
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.data.sample import Turn
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import hf_reference, layout_logits
from megatron_vlm.testing.runs import metrics_of
from megatron_vlm.testing.twins.llava_internlm2 import llava_inputs, write_tiny_parts
from tests.examples.guides import run_guide
from tests.examples.shell import EXAMPLES, environment

SHARED = (
    "training.train_epochs=null training.precision=fp32 data.seq_length=256 data.num_workers=1 data.packing=true "
    "data.group_by=null training.micro_batch_size=1 checkpoint.save_interval=null training.global_batch_size=4"
)


@pytest.mark.slow
@pytest.mark.full
def test_guide(tmp_path):
    parts = write_tiny_parts(tmp_path / "parts", std=0.05)
    make = [sys.executable, str(EXAMPLES / "quickstart" / "make_digits.py"), "--out", str(tmp_path / "digits")]
    subprocess.run(make, check=True, env=environment(), timeout=120)
    records = json.loads((tmp_path / "digits" / "train.json").read_text())[:1437]
    for name, some in (("captions", records[:200]), ("records", records)):
        (tmp_path / f"{name}.json").write_text(json.dumps(some))
    work = tmp_path / "work"
    picture = next((tmp_path / "digits" / "heldout").glob("*.png"))
    output = run_guide(
        "llava_internlm2.md",
        {
            "LLM": parts["llm"],
            "VISION": parts["vision"],
            "CAPTIONS": tmp_path / "captions.json",
            "RECORDS": tmp_path / "records.json",
            "IMAGES": tmp_path / "digits",
            "PICTURE": picture,
            "WORK": work,
        },
        {
            "pretrain_llava_internlm2.sh": f"{SHARED} training.train_iters=4",
            "finetune_llava_internlm2.sh": f"{SHARED} training.train_iters=100 optimizer.lr=3e-3",
        },
    )
    assert "world size 8 = tp 2 x pp 1 x dp 4" in output  # the dry run
    losses = [line["loss"] for line in metrics_of(work / "two")]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert len(losses) == 100 and losses[-1] < losses[0] / 2

    # Stage 1 trained the projector alone, stage 2 left the tower as it was.
    tower, trained_tower = (
        load_file(d / "model.safetensors") for d in (parts["vision"], work / "xtuner/visual_encoder")
    )
    assert all(torch.equal(tower[name], trained_tower[name]) for name in tower)
    llm = load_file(parts["llm"] / "model.safetensors")
    changed = load_file(work / "xtuner" / "model.safetensors")
    assert llm.keys() == changed.keys() and not torch.equal(llm["output.weight"], changed["output.weight"])

    from transformers import LlavaForConditionalGeneration

    trained = LlavaForConditionalGeneration.from_pretrained(work / "hf", attn_implementation="eager").eval()
    processor = registry.get("llava_internlm2").processor(work / "hf", DataConfig(seq_length=256))
    turns = [Turn(role="user", text="<image>\nWhat digit is this?"), Turn(role="assistant", text="seven")]
    sample = processor.encode("k", turns, [Image.open(picture)])
    expected = hf_reference(trained, [sample], gradients=False, inputs=llava_inputs)[1]
    (ours,) = run_distributed(layout_logits, str(work / "two"), [row_from_samples([sample])], {}, {})
    difference = float((ours["logits"][0] - expected).abs().max())
    print(f"logits {difference:.1e} of {float(expected.abs().max()):.1f}")
    assert difference <= 1e-5 * float(expected.abs().max())
