"""Selection picks what PEFT picks on the HF twin, with the same ranks; pairs lie over ranks as their linears' weights do."""

import json

import pytest
import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.peft.adapter_map import adapter_mapping, trained_mapping
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.peft.select import make_plan


def plan_of(source, **settings):
    return make_plan(source.spec, source.config, PeftConfig(**settings), source.infos)


RULES = {
    "suffixes": dict(target_modules=("q_proj", "v_proj", "gate_proj")),
    "whole name": dict(target_modules=("model.connector.modality_projection.up_proj", "mlp.fc2")),
    "expression": dict(target_modules=r".*text_model.*\.(q|k|v|o|up|gate)_proj"),
    "all-linear": dict(target_modules="all-linear"),
    "head": dict(target_modules=("lm_head", "down_proj")),
    "excluded": dict(target_modules=("q_proj", "k_proj"), exclude_modules=r".*vision_model.*"),
    "saved": dict(target_modules="all-linear", modules_to_save=("connector",)),
    "patterns": dict(
        target_modules=("q_proj", "k_proj"),
        r=4,
        alpha=8,
        rank_pattern={"k_proj": 2, r"model\.vision_model\..*": 3},
        alpha_pattern={r"layers\.1\.self_attn\.q_proj": 5.0},
    ),
    "rslora": dict(target_modules=("v_proj",), r=4, alpha=8, rslora=True),
}


def peft_choice(model, settings):
    """{module: (r, scaling)} and names of trained base parameters, by PEFT on a copy of the model without data."""
    import copy

    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    names = {"alpha": "lora_alpha", "rslora": "use_rslora"}
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(**{names.get(k, k): v for k, v in listed.items()}))
    chosen = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in wrapped.named_modules()
        if isinstance(module, LoraLayer)
    }
    saved = {
        name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }
    return chosen, saved


@pytest.mark.parametrize("rule", RULES)
def test_picks_what_peft_picks(twin, rule):
    model, source = twin("idefics2")
    defaults = dict(r=8, alpha=16)
    plan = plan_of(source, **RULES[rule])
    chosen, saved = peft_choice(model, {**defaults, **RULES[rule]})
    assert {target.hf_module: (target.r, target.scaling) for target in plan.targets} == chosen
    assert {hf for name in plan.saved for hf in source.entries[name].hf} == saved
    assert len(chosen) > 2


@pytest.mark.parametrize(("name", "count"), [("internvl3", 2), ("llava", 1)])
def test_names_are_those_in_memory(twin, name, count):
    """Where files and memory differ, names are transformers' in memory, as PEFT sees them."""
    model, source = twin(name)
    settings = dict(target_modules="all-linear", modules_to_save=("multi_modal_projector",))
    plan = plan_of(source, **settings)
    chosen, saved = peft_choice(model, {**settings, "r": 8, "alpha": 16})
    assert {target.hf_module: (target.r, target.scaling) for target in plan.targets} == chosen
    trained = {source.mapping.module_name(hf) for name in plan.saved for hf in source.entries[name].hf}
    assert trained == saved and len(saved) >= 2 * count


def test_families_without_a_class_of_their_own(twin):
    """Names of the families' own files; a fused linear of theirs gets one pair; partial LoRA is no target."""
    _, source = twin("xcomposer2")
    layers = source.config.text.num_layers
    names = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    plan = plan_of(source, target_modules=names, r=64, alpha=64)
    assert len(plan.targets) == 5 * layers
    assert {target.scaling for target in plan.targets} == {1.0}
    everything = plan_of(source, target_modules="all-linear")
    assert not any("lora" in target.hf_module.lower() for target in everything.targets)
    assert not any(target.hf_module == "output" for target in everything.targets)
    _, source = twin("internlm2")
    plan = plan_of(source, target_modules=("wqkv", "output"))
    pairs = [entry for entry in trained_mapping(source.mapping, plan) if "wqkv" in entry.name]
    assert [entry.hf[0] for entry in pairs[:2]] == [
        f"base_model.model.model.layers.0.attention.wqkv.lora_{x}.weight" for x in "AB"
    ]


def test_another_layout_of_names(twin):
    """``names`` xtuner: one pair for the fused wqkv, folders as parents, and a head without the image token's row."""
    _, source = twin("llava_internlm2")
    plan = plan_of(source, target_modules=("wqkv", "output", "fc1"), names="xtuner", modules_to_save=("projector",))
    text = source.config.text
    assert sum(target.key == "wqkv" for target in plan.targets) == text.num_layers
    assert {name.split(".")[0] for name in plan.saved} == {"connector"}
    entries = adapter_mapping(source.mapping, plan).by_name()
    head = entries["language_model.output_layer.lora.output.b"]
    full = torch.randn(text.vocab_size, 8)
    (out,) = head.from_full(full)
    assert len(out) == source.config.source_vocab_size < text.vocab_size
    assert torch.equal(head.to_full([out])[: len(out)], out)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "idefics2",
            dict(target_modules=("query",)),
            r"called 'query'; could be matched: llm: q_proj, .*down_proj, lm_head; v",
        ),
        ("idefics2", dict(target_modules="q_proj"), "no linear's whole name matches"),
        ("idefics2", dict(target_modules=("q_proj", "embed_tokens")), "'embed_tokens'"),
        ("idefics2", dict(target_modules=("q_proj",), exclude_modules=("vision_model",)), "leaves out none"),
        ("idefics2", dict(target_modules=("q_proj",), rank_pattern={"v_proj": 4}), "'v_proj' matches no target"),
        ("idefics2", dict(target_modules=("down_proj",), vision_r=4), "peft.vision_r without effect"),
        ("idefics2", dict(modules_to_save=("conector",)), "did you mean 'connector'"),
        ("idefics2", dict(modules_to_save=("q_proj",)), "which are one tensor here"),
        ("idefics2", dict(target_modules=("q_proj",), names="chat"), "no layout of family idefics2"),
        ("internlm2", dict(target_modules=("wqkv",), vision_alpha=4), "no target lies in the vision part"),
        ("tied", dict(target_modules=("lm_head",)), "lm_head is tied"),
        ("tied", dict(modules_to_save=("embed_tokens",)), "would untie"),
    ],
)
def test_mistakes(twin, name, settings, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(twin(name)[1], **settings)


def test_biases(twin):
    _, source = twin("internvl3")
    assert not plan_of(source, target_modules=("q_proj",)).biases
    adapted = plan_of(source, target_modules=r".*language_model.*\.(q|v)_proj", bias="lora_only").biases
    parts = {hf.split(".")[-2] for names in adapted.values() for hf in names}
    assert len(adapted) == source.config.text.num_layers and parts == {"q_proj", "v_proj"}
    everything = plan_of(source, target_modules=("q_proj",), bias="all").biases
    assert set(everything) == {entry.name for entry in source.mapping if entry.name.endswith(".bias")}
    assert json.dumps(everything)
