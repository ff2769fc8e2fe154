"""PeftConfig: PEFT's words, and settings without effect are errors."""

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.peft.config import PeftConfig


def test_nothing_is_adapted_by_default():
    assert not PeftConfig().active
    assert PeftConfig.from_dict(PeftConfig().to_dict()) == PeftConfig()


def test_a_checkpoint_may_have_recorded_settings_that_are_gone():
    assert PeftConfig.from_checkpoint({"r": 4, "target_modules": ["q"], "quantize_backend": None}).r == 4
    with pytest.raises(ConfigError):
        PeftConfig.from_checkpoint({"target_modules": ["q"], "quantise": "nf4"})


def test_targets_are_a_list_or_a_text():
    assert PeftConfig.from_dict({"target_modules": ["q_proj", "v_proj"]}).target_modules == ("q_proj", "v_proj")
    assert PeftConfig.from_dict({"target_modules": "all-linear"}).target_modules == "all-linear"


def test_a_part_of_the_model_has_its_own_rank_and_alpha():
    config = PeftConfig(target_modules="all-linear", r=512, alpha=256, vision_r=64, vision_alpha=0.5)
    assert config.rank_of("llm") == config.rank_of("connector") == (512, 256)
    assert config.rank_of("vision") == (64, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q"], "r": 0}, "peft.r must be at least 1, got 0"),
        ({"target_modules": ["q"], "vision_r": 0}, "peft.vision_r must be at least 1"),
        ({"target_modules": ["q"], "rank_pattern": {"k": -1}}, r"rank_pattern\['k'\] must be at least 1, got -1"),
        ({"target_modules": ["q"], "dropout": 1.0}, "below 1, got 1.0"),
        ({"target_modules": []}, "peft.target_modules is empty"),
        ({"target_modules": ["q"], "adapter": "x"}, "leave target_modules out"),
        ({"adapter": "x", "r": 4}, "peft.r: the config of peft.adapter 'x' says them"),
        ({"r": 4, "dropout": 0.1}, "peft.dropout, peft.r without effect"),
        ({"double_quant": False}, "no effect without peft.quantize"),
        ({"quantize": "nf4", "quantize_groups": ["vit"]}, "'vit' is none of llm"),
        ({"bias": "all"}, "peft.bias without effect"),
        ({"modules_to_save": ["p"], "bias": "lora_only"}, "biases of adapted linears"),
        ({"names": "xtuner"}, "peft.names without effect"),
        ({"target_modules": ["q"], "rank": 4}, "did you mean"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(ConfigError, match=message):
        PeftConfig.from_dict(settings, "peft")
