"""Adapter flags of the original programs, in a family's module names."""

import pytest

from megatron_vlm import registry
from megatron_vlm.errors import ConfigError
from megatron_vlm.options.adapters import peft_section
from megatron_vlm.options.flag_values import FlagValues

SPEC = registry.get("internvl3")
HF = {"model_type": "internvl_chat"}


def section(run=None, given=(), spec=SPEC, **flags):
    return peft_section(FlagValues(**flags), run if run is not None else {}, frozenset(given), spec, HF)


def test_finetune_py_with_its_defaults():
    made, notes = section(use_lora=True, lora_r=8)
    assert made == {
        "r": 8, "alpha": 64.0, "dropout": 0.05, "target_modules": SPEC.adapters.language, "modules_to_save": [],
    }  # fmt: skip
    assert notes == []
    assert section(use_lora=True, lora_target_modules=("q_proj,k_proj", "v_proj"))[0]["target_modules"] == [
        "q_proj", "k_proj", "v_proj",
    ]  # fmt: skip
    assert section(use_lora=True, lora_target_modules=("all",), load_in_4bit=True)[0]["quantize"] == "nf4"


def test_a_rank_of_internvl_is_alpha_by_two():
    made, _ = section(use_llm_lora=16, use_backbone_lora=4)
    assert (made["r"], made["alpha"], made["vision_r"], made["vision_alpha"]) == (16, 32.0, 4, 8.0)
    assert SPEC.adapters.vision in made["target_modules"]
    assert section({"peft": {"r": 3}}, ["peft.r"], use_llm_lora=16)[0]["r"] == 3  # section.key=value wins


def test_no_adapters():
    assert section() == (None, [])
    made, notes = section(lora_r=8)
    assert made is None and notes == ["--lora_r: no effect without --use_lora True"]


def test_freeze_flags_name_what_trains_in_full_beside_them():
    run = {"model": {"freeze_connector": False, "freeze_llm": True, "freeze_vision": True}}
    made, _ = section(run, ["model.freeze_connector", "model.freeze_llm"], use_llm_lora=16)
    assert made["modules_to_save"] == list(SPEC.adapters.whole(HF)["connector"])
    assert run["model"] == {}


def test_contradictions_are_named():
    with pytest.raises(ConfigError, match="--use_lora with --use_llm_lora 4 or --use_backbone_lora 0"):
        section(use_lora=True, use_llm_lora=4)
    with pytest.raises(ConfigError, match="--use_llm_lora is a rank, at least 0"):
        section(use_llm_lora=-1)
    with pytest.raises(ConfigError, match="family internlm2 has no tower"):
        section(spec=registry.get("internlm2"), use_llm_lora=4, use_backbone_lora=4)
