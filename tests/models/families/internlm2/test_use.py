"""InternLM2 in use: the recipe's dry run at the published size, and the data of its example."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.options.resolve import resolve
from megatron_vlm.training.memory.estimate import estimate

EXAMPLES = Path(__file__).parents[4] / "examples" / "internlm2"
# config.json of internlm/internlm2-chat-1_8b, what the model depends on.
PUBLISHED_1_8B = {
    "model_type": "internlm2", "bias": False, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 92544,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "tie_word_embeddings": False,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 2)])
def test_the_recipe_fits_the_published_model(tp, pp):
    sizes = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp), "--world-size", "8"]
    recipe = [
        "--config",
        str(EXAMPLES / "finetune_internlm2.yaml"),
        "--load",
        "x",
        "--save",
        "y",
        "--dry-run",
        "--device",
        "cpu",
    ]
    config, _ = resolve([*recipe, *sizes, "--global-batch-size", "16"])
    model = registry.get("internlm2").config(PUBLISHED_1_8B)
    config.check_model(model)
    stages = estimate(config, registry.get("internlm2"), model, 8, "cpu", trace=False)
    held = tp * sum(sum(stage.parameters.values()) for stage in stages)
    padded = -(-92544 // (128 * tp)) * 128 * tp
    # 1.9 B: every matrix is split over the ranks, norms are on each.
    layer = 2048 * (16 + 2 * 8) * 128 + 2048 * 2048 + 3 * 2048 * 8192
    assert held == 2 * padded * 2048 + 24 * layer + tp * (2 * 24 + 1) * 2048
    assert config.optimizer.warmup_start == pytest.approx(1e-5 * config.optimizer.lr)
    assert not torch.distributed.is_initialized()


def test_identity_data(tmp_path):
    """As many records as asked for, all distinct until every pair was used, the name in each answer; read as openai's format."""
    from megatron_vlm.data.formats import open_sources, read_source
    from megatron_vlm.data.formats.records import Record

    make = [
        sys.executable,
        str(EXAMPLES / "make_identity_data.py"),
        "--name",
        "Nova",
        "--out",
        str(tmp_path / "a.json"),
    ]
    subprocess.run([*make, "--n", "30"], check=True, capture_output=True, timeout=60)
    records = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    turns = [tuple(message["content"] for message in record["messages"]) for record in records]
    assert len(records) == 30 and all("Nova" in answer for _, answer in turns)
    assert len(set(turns)) == 23 and turns[23:] == turns[:7]  # 5 x 3 pairs of English, 4 x 2 of Chinese
    assert any("你" in question for question, _ in turns)
    (source,) = open_sources("openai", [tmp_path / "a.json"])
    read = [record for _, _, record in read_source(source) if isinstance(record, Record)]
    assert [tuple(turn.text for turn in record.turns) for record in read] == turns
    failed = subprocess.run([*make, "--n", "0"], capture_output=True, text=True, timeout=60)
    assert failed.returncode == 2 and "at least 1 is needed" in failed.stderr
