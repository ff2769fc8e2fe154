"""The recipes' dry runs at the published sizes."""

from pathlib import Path

import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.options.resolve import resolve
from megatron_vlm.training.memory.estimate import estimate
from tests.models.families.xcomposer2.test_mapping import published_tensors
from tests.models.families.xcomposer2.test_processor import OF_VARIANT, PUBLISHED

EXAMPLES = Path(__file__).parents[4] / "examples" / "xcomposer2"
RECIPES = {"vl-7b": "finetune_xcomposer2.yaml", "4khd-7b": "finetune_xcomposer2_4khd.yaml"}


@pytest.mark.parametrize("variant, tp, pp", [("vl-7b", 1, 1), ("4khd-7b", 4, 2)])
def test_the_recipe_fits_the_published_model(variant, tp, pp):
    sizes = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp), "--world-size", "8"]
    recipe = [
        "--config",
        str(EXAMPLES / RECIPES[variant]),
        "--load",
        "x",
        "--save",
        "z",
        "--dry-run",
        "--device",
        "cpu",
    ]
    config, _ = resolve([*recipe, *sizes, "--global-batch-size", "64"])
    model = registry.get("xcomposer2").config({**PUBLISHED, **OF_VARIANT[variant]})
    assert config.check_world(8) == 8 // tp // pp
    config.check_model(model)
    stages = estimate(config, registry.get("xcomposer2"), model, 8, "cpu", trace=False)
    held = tp * sum(sum(stage.parameters.values()) for stage in stages)
    # Every tensor of the checkpoint is somewhere; what is whole on every rank is counted tp times.
    mapping = registry.get("xcomposer2").mapping(model, tp=tp).padded(128)
    shapes = published_tensors(variant)
    expected = 0
    for entry in mapping:
        count = sum(torch.Size(shapes[name]).numel() for name in entry.hf)
        expected += count if entry.split.dim is not None else tp * count
    padding = 2 * (-(-92544 // (128 * tp)) * 128 * tp - 92544) * 4096
    assert held == expected + padding
    assert 8.6e9 < sum(torch.Size(shape).numel() for shape in shapes.values()) < 8.7e9
    settings = config.optimizer
    assert (settings.lr, settings.weight_decay, settings.adam_beta2, settings.lr_warmup_fraction) == (
        1e-5,
        0.1,
        0.95,
        0.01,
    )
    assert config.model.freeze == ("vision",) and not torch.distributed.is_initialized()
