"""docs/guides/xcomposer2.md on tiny twins and digits: 100 steps halve the loss, the reference gives the export's logits."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from megatron_vlm import registry
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.data.sample import Turn
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import layout_logits
from megatron_vlm.testing.runs import metrics_of
from megatron_vlm.testing.twins.xcomposer2 import write_tiny_xcomposer2
from megatron_vlm.testing.twins.xcomposer2_reference import Reference
from tests.examples.guides import run_guide
from tests.examples.shell import EXAMPLES, environment

STEPS = (
    "training.train_epochs=null training.precision=fp32 data.seq_length=256 data.num_workers=1 optimizer.lr=3e-3 "
    "data.packing=true training.global_batch_size=4 checkpoint.save_interval=null"
)
REPLICAS = "parallel.tensor_model_parallel_size=1 parallel.sequence_parallel=false"


@pytest.mark.slow
@pytest.mark.full
def test_guide(tmp_path):
    for name, variant, shards in (("model", "7b", 2), ("hd", "4khd-7b", 0)):
        (tmp_path / name).mkdir()
        write_tiny_xcomposer2(tmp_path / name, variant, std=0.05, shards=shards, plora_dropout=0.05)
    make = [sys.executable, str(EXAMPLES / "quickstart" / "make_digits.py"), "--out", str(tmp_path / "digits")]
    subprocess.run(make, check=True, env=environment(), timeout=120)
    records = json.loads((tmp_path / "digits" / "train.json").read_text())[:1437]
    for record in records:
        for turn in record["conversations"]:
            turn["from"] = {"human": "user", "gpt": "assistant"}[turn["from"]]
            turn["value"] = turn["value"].replace("<image>", "<ImageHere>")
    (tmp_path / "vl_data.json").write_text(json.dumps(records))
    (tmp_path / "data.txt").write_text("vl_data.json 1.437\n")

    work = tmp_path / "work"
    output = run_guide(
        "xcomposer2.md",
        {
            "MODEL": tmp_path / "model",
            "HD_MODEL": tmp_path / "hd",
            "LIST": tmp_path / "data.txt",
            "IMAGES": tmp_path / "digits",
            "PICTURE": tmp_path / "digits" / records[0]["image"],
            "WORK": work,
        },
        {
            "finetune_xcomposer2.sh": f"training.train_iters=100 {REPLICAS} {STEPS}",
            "finetune_xcomposer2_4khd.sh": f"training.train_iters=4 {STEPS}",
        },
    )
    assert "world size 8 = tp 4 x pp 1 x dp 2" in output  # the dry run
    losses = [line["loss"] for line in metrics_of(work / "sft")]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; 4khd {[line['loss'] for line in metrics_of(work / 'hd')]}")
    assert len(losses) == 100 and losses[-1] < losses[0] / 2

    image = Image.open(next((tmp_path / "digits" / "heldout").glob("*.png")))
    turns = [Turn(role="user", text="<image>What digit is this?"), Turn(role="assistant", text="seven")]
    for run, export, hd_num in (("sft", "export", None), ("hd", "export-hd", 6)):
        processor = registry.get("xcomposer2").processor(work / export, DataConfig(seq_length=256, hd_num=hd_num))
        sample = processor.encode("k", turns, [image])
        expected = Reference(work / export).run([sample], gradients=False)[1]
        (ours,) = run_distributed(layout_logits, str(work / run), [row_from_samples([sample])], {}, {})
        difference = float((ours["logits"][0] - expected).abs().max())
        print(f"logits {difference:.1e} of {float(expected.abs().max()):.1f}")
        assert difference <= 1e-5 * float(expected.abs().max())
        assert (work / export / "modeling_internlm_xcomposer2.py").exists()
