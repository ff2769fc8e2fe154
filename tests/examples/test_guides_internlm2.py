"""docs/guides/internlm2.md on a tiny twin: the assistant learns its name, and transformers gives the export's logits."""

import pytest

from megatron_vlm import registry
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.data.sample import Turn
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import hf_reference, layout_logits
from megatron_vlm.testing.runs import metrics_of
from megatron_vlm.testing.twins.internlm2 import llama_inputs, write_tiny_internlm2
from tests.examples.guides import run_guide

STEPS = (
    "training.train_epochs=null training.train_iters=100 training.precision=fp32 data.seq_length=256 data.num_workers=1 "
    "optimizer.lr=3e-3 training.global_batch_size=4 checkpoint.save_interval=null"
)


@pytest.mark.slow
@pytest.mark.full
def test_guide(tmp_path):
    (tmp_path / "model").mkdir()
    write_tiny_internlm2(tmp_path / "model", std=0.05)
    work = tmp_path / "work"
    output = run_guide(
        "internlm2.md",
        {"MODEL": tmp_path / "model", "COUNT": 400, "WORK": work},
        {"finetune_internlm2.sh": STEPS},
    )
    assert "world size 8 = tp 2 x pp 1 x dp 4" in output  # the dry run
    losses = [line["loss"] for line in metrics_of(work / "sft")]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert len(losses) == 100 and losses[-1] < losses[0] / 2
    assert "Nova" in output.splitlines()[-1]  # the answer
    assert (work / "internlm2" / "modeling_internlm2.py").exists()

    from transformers import LlamaForCausalLM

    trained = LlamaForCausalLM.from_pretrained(work / "llama", attn_implementation="eager").eval()
    processor = registry.get("internlm2").processor(work / "internlm2", DataConfig(seq_length=256))
    sample = processor.encode("k", [Turn(role="user", text="Who are you?"), Turn(role="assistant", text="Nova")], [])
    expected = hf_reference(trained, [sample], gradients=False, inputs=llama_inputs)[1]
    (ours,) = run_distributed(layout_logits, str(work / "sft"), [row_from_samples([sample])], {}, {})
    difference = float((ours["logits"][0] - expected).abs().max())
    print(f"logits {difference:.1e} of {float(expected.abs().max()):.1f}")
    assert difference <= 1e-5 * float(expected.abs().max())
