"""InternVL in use: answers equal transformers', and the recipe's dry run at the published layout."""

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from megatron_vlm import registry
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.sample import Turn
from megatron_vlm.models.families.internvl3.processor import InternVL3Processor
from megatron_vlm.options.resolve import resolve
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import layout_answers
from megatron_vlm.testing.twins.internvl3 import (
    hf_inputs,
    write_chat_layout,
    write_tiny_internvl2,
    write_tiny_internvl3,
)
from megatron_vlm.training.memory.estimate import estimate
from megatron_vlm.training.memory.flops import forward_flops

NEW = 10
RECIPE = "examples/internvl3/finetune_internvl3.yaml"
# config.json of OpenGVLab/InternVL3-8B, what the model depends on.
PUBLISHED_8B = {
    "model_type": "internvl_chat",
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 448,
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internvl2_5",
    "use_thumbnail": True,
    "llm_config": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "vocab_size": 151674,
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 448,
        "patch_size": 14,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "qk_normalization": False,
    },
}


@pytest.mark.parametrize("decoder", ["qwen3", "internlm2"])
def test_greedy_answers_equal_transformers(tmp_path, decoder):
    """Prompts without, with one and with two images, from both layouts, in two parallel layouts."""
    if decoder == "internlm2":
        model = write_tiny_internvl2(tmp_path)
    else:
        model = write_tiny_internvl3(tmp_path / "hf", text=dict(model_type="qwen3", head_dim=12))
        write_chat_layout(tmp_path / "chat", model)
    processor = InternVL3Processor.from_pretrained(tmp_path / "hf", DataConfig(seq_length=1024))
    china = Image.fromarray(load_sample_image("china.jpg"))
    images = [china.resize((90, 50)), china.resize((32, 64))]
    texts = ["How many cats?", "<image>\nWhat digit is this?", "<image> and <image>: the same?"]
    prompts = [
        processor.encode_prompt([Turn(role="user", text=text)], images[: text.count("<image>")]) for text in texts
    ]
    expected = []
    for prompt in prompts:
        out = model.generate(
            **hf_inputs(prompt), max_new_tokens=NEW, do_sample=False, eos_token_id=list(processor.stop_ids)
        )
        new = out[0, len(prompt.input_ids) :].tolist()
        expected.append(tuple(i for i in new if i not in processor.stop_ids))
    assert any(len(ids) == NEW for ids in expected)
    sampling = dict(max_new_tokens=NEW, batch_size=2)
    for layout, tp, pp in (("hf", 1, 1), ("chat", 2, 2)):
        parallel = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
        folder = str(tmp_path / layout)
        (rank, *_) = run_distributed(
            layout_answers, folder, prompts, [parallel], sampling, processor.stop_ids, tp=tp, pp=pp
        )
        assert [answer.ids for answer in rank[0]] == expected


# What differs in OpenGVLab/InternVL3_5-8B and, of the first generations, in OpenGVLab/InternVL2-8B.
QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "rope_scaling": None, "vocab_size": 151936, "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip
INTERNLM2_7B = {
    "model_type": "internlm2", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "bias": False,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
    "rope_theta": 1e6, "rope_scaling": {"factor": 2.0, "type": "dynamic"}, "vocab_size": 92553, "hidden_act": "silu",
}  # fmt: skip


@pytest.mark.parametrize("llm, recipe", [(QWEN3_8B, "finetune_internvl3_5"), (INTERNLM2_7B, "finetune_internvl3")])
def test_other_generations_fit_their_recipes(llm, recipe):
    """Parameters and operations as worked out by hand: matrices are split over the ranks, norms are on each."""
    paths = ["--load", "x", "--save", "y", "--dry-run", "--device", "cpu", "--world-size", "8"]
    sizes = ["--tensor-model-parallel-size", "4", "--global-batch-size", "128"]
    config, _ = resolve(["--config", f"examples/internvl3/{recipe}.yaml", *paths, *sizes])
    spec = registry.get("internvl3")
    model = spec.config({**PUBLISHED_8B, "llm_config": llm})
    config.check_model(model)
    (stage,) = estimate(config, spec, model, 8, "cpu", trace=False)
    h, ffn, layers, vocab = (
        llm[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    matrices = layers * (h * (32 + 2 * 8) * 128 + h * h + 3 * h * ffn)
    norms = (2 * layers + 1) * h + (layers * 2 * 128 if llm is QWEN3_8B else 0)
    assert 4 * stage.parameters["llm"] == matrices + 2 * -(-vocab // 512) * 512 * h + 4 * norms
    cost = forward_flops(model, segments=[1000], supervised=900)
    assert cost.llm == 2 * 1000 * matrices + layers * 2 * 1000**2 * h + 2 * 900 * h * vocab


@pytest.mark.parametrize("tp, pp", [(4, 1), (2, 2)])
def test_the_recipe_fits_the_published_model(tp, pp):
    sizes = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp), "--world-size", "8"]
    config, _ = resolve(
        [
            "--config",
            RECIPE,
            "--load",
            "x",
            "--save",
            "y",
            "--dry-run",
            "--device",
            "cpu",
            *sizes,
            "--global-batch-size",
            "128",
        ]
    )
    spec = registry.get("internvl3")
    model = spec.config(PUBLISHED_8B)
    config.check_model(model)
    assert model.tile_tokens() == 256
    stages = estimate(config, spec, model, 8, "cpu", trace=False)
    held = {group: tp * sum(stage.parameters[group] for stage in stages) for group in ("llm", "connector")}
    padded = -(-151674 // (128 * tp)) * 128 * tp - 151674
    # 7.6 B of the decoder: embedding, head and 28 layers; every matrix is split over the ranks, norms are on each.
    layer = 3584 * (28 + 2 * 4) * 128 + (28 + 2 * 4) * 128 + 3584 * 3584 + 3 * 3584 * 18944
    norms = (2 * 28 + 1) * 3584
    assert held["llm"] == 2 * (151674 + padded) * 3584 + 28 * layer + tp * norms
    assert held["connector"] == 4096 * 3584 + 3584 + 3584 * 3584 + tp * (2 * 4096 + 3584)
    assert all(stage.trainable["vision"] == 0 for stage in stages) and stages[0].parameters["vision"] > 304e6 / tp
    assert not torch.distributed.is_initialized()
