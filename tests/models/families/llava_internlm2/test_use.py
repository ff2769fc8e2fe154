"""LLaVA-InternLM2 in use: the recipes' dry runs at the published sizes."""

from pathlib import Path

import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.options.resolve import resolve
from megatron_vlm.training.memory.estimate import estimate

EXAMPLES = Path(__file__).parents[4] / "examples" / "llava_internlm2"
# InternLM2-chat-1.8b as Llama, with one row for <image>, and openai/clip-vit-large-patch14-336.
PUBLISHED = {
    "model_type": "llava",
    "image_token_index": 92544,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "language_model_source": {"model_type": "internlm2", "vocab_size": 92544},
    "text_config": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 92545,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    },
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
    },
}  # fmt: skip
CLIP_LAYER = 4 * (1024 * 1024 + 1024) + 2 * 4096 * 1024 + 4096 + 1024 + 4 * 1024


@pytest.mark.parametrize("recipe, rows, per_device", [("pretrain", 256, 32), ("finetune", 128, 16)])
def test_the_recipes_fit_the_published_model(recipe, rows, per_device):
    """As the scripts start them on 8 GPUs: tp 4, dp 2."""
    settings = [
        *(
            "--config",
            str(EXAMPLES / f"{recipe}_llava_internlm2.yaml"),
            "--load",
            "x",
            "--save",
            "y",
            "--dry-run",
            "--device",
            "cpu",
        ),
        *("--tensor-model-parallel-size", "4", "--sequence-parallel", "--world-size", "8"),
        *("--global-batch-size", str(rows), "--micro-batch-size", str(per_device), "--no-packing"),
    ]
    config, _ = resolve(settings)
    spec = registry.get("llava_internlm2")
    model = spec.config(PUBLISHED)
    config.check_model(model)
    assert model.vision.side**2 == 576 and model.vision.num_run_layers == 23
    (stage,) = estimate(config, spec, model, 8, "cpu", trace=False)
    layer = 2048 * (16 + 2 * 8) * 128 + 2048 * 2048 + 3 * 2048 * 8192
    padded = -(-92545 // 512) * 512
    assert 4 * stage.parameters["llm"] == 2 * padded * 2048 + 24 * layer + 4 * (2 * 24 + 1) * 2048
    connector = 2048 * 1024 + 2048 + 2048 * 2048
    assert 4 * stage.parameters["connector"] == connector + 4 * 2048
    assert 303.5e6 < 24 * CLIP_LAYER + 577 * 1024 + 3 * 14 * 14 * 1024 + 5 * 1024 < 303.6e6
    assert stage.parameters["vision"] > 303.5e6 / 4 and stage.trainable["vision"] == 0
    assert stage.trainable["llm"] == (0 if recipe == "pretrain" else stage.parameters["llm"])
    assert stage.trainable["connector"] == stage.parameters["connector"]
    assert not torch.distributed.is_initialized()


def test_a_trained_tower_leaves_its_last_layer_alone():
    """The features are those of the layer before the last: that layer and the norm after it have nothing to learn."""
    flags = [
        "--config",
        str(EXAMPLES / "finetune_llava_internlm2.yaml"),
        "--load",
        "x",
        "--save",
        "y",
        "--dry-run",
        "--device",
        "cpu",
    ]
    config, _ = resolve([*flags, "model.freeze_vision=false", "optimizer.vision_lr=2e-6"])
    spec = registry.get("llava_internlm2")
    (stage,) = estimate(config, spec, spec.config(PUBLISHED), 1, "cpu", trace=False)
    assert stage.parameters["vision"] - stage.trainable["vision"] == CLIP_LAYER + 2 * 1024
