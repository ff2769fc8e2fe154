"""PEFT's rules of names against PEFT's own functions."""

import itertools
from types import SimpleNamespace

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from megatron_vlm.peft.name_rules import by_pattern, last_name, lies_under, matches, targeted

MODULES = (
    "model.language_model.layers.0.self_attn.q_proj", "model.language_model.layers.11.mlp.up_proj", "layers.1.q_proj",
    "model.vision_tower.encoder.layers.1.layers.0.fc1", "mlp1.1", "model.mlp1.1", "lm_head", "model.self_attn.q_projection",
)  # fmt: skip
TARGETS = (["q_proj", "fc1", "mlp1.1"], ["layers.1.q_proj", "lm_head"], r".*layers\.\d+\..*proj", "lm_head", [])


def test_targets_are_those_of_peft():
    settings = itertools.product(
        TARGETS,
        (None, ["fc1"], r".*vision_tower.*"),
        (None, [], 1, [0, 11]),
        (None, "layers", ["h", "layers"], []),
    )
    counts = {True: 0, False: 0}
    for target_modules, exclude_modules, layers_to_transform, layers_pattern in settings:
        config = dict(
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
        )
        for module in MODULES:
            expected = check_target_module_exists(SimpleNamespace(target_parameters=None, **config), module)
            assert targeted(config, module) == bool(expected), (config, module)
            counts[bool(expected)] += 1
    assert min(counts.values()) > 200


def test_patterns_are_those_of_peft():
    patterns = {"q_proj": 1, r"layers\.0\..*": 2, "encoder.layers.1": 3, ".*head": 4, "mlp1.1": 5}
    for module in MODULES:
        expected = patterns.get(get_pattern_key(patterns, module), 0)
        assert by_pattern(patterns, module, 0) == expected, module
    assert {by_pattern(patterns, module, 0) for module in MODULES} == {0, 1, 2, 4, 5}
    assert by_pattern(None, "q_proj", 7) == 7


def test_folders_of_a_naming_are_parents():
    assert matches("llm_adapter/layers.0.wqkv", ["wqkv"]) and matches("projector/model.0", ["projector.model.0"])
    assert not matches("projector/model.0", ["model"]) and not matches("q_proj", None)
    assert last_name("mlp1.1") == "mlp1.1" and last_name("a/b.q_proj") == "q_proj" and last_name("7") == "7"
    assert lies_under("vision/layers.0.fc1.weight", "fc1") and lies_under("newline", "newline")
    assert not lies_under("vision.fc10.weight", "fc1")
