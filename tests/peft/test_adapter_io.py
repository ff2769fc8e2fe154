"""Adapters of PEFT in and out: every tensor equal, nothing else wakes up, the same logits; and what is refused."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_vlm.conversion.convert import export_hf
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.errors import ConversionError
from megatron_vlm.peft.adapter_io import CONFIG, WEIGHTS
from megatron_vlm.peft.export import export_adapter
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.testing.twins.internvl3 import write_tiny_internvl3
from megatron_vlm.testing.twins.llava_internlm2 import write_tiny_llava

LOGITS = 1e-5  # of the largest; measured: 2.9e-6
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "idefics2": (
        write_tiny_idefics2,
        dict(
            target_modules=r"model\.(text_model|vision_model).*\.(q_proj|v_proj|out_proj|gate_proj|down_proj|fc1)",
            r=4, lora_alpha=6, rank_pattern={r"model\.vision_model\..*": 3}, alpha_pattern={"down_proj": 5},
            modules_to_save=["connector"],
        ),
    ),
    "llava": (
        write_tiny_llava,
        dict(
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"], r=6, lora_alpha=3, use_rslora=True,
            modules_to_save=["multi_modal_projector"], bias="lora_only",
        ),
    ),
    "internvl3": (write_tiny_internvl3, dict(target_modules="all-linear", r=2, lora_alpha=4, bias="all", lora_dropout=0.1)),
}  # fmt: skip


@dataclass
class Trained:
    """A base, an adapter that PEFT wrote for it, and what the two compute."""

    base: Path
    adapter: Path
    inputs: list[dict[str, Tensor]]
    logits: list[Tensor]
    modules: set[str]
    merged: dict[str, Tensor]


@pytest.fixture(scope="module", params=CASES)
def trained(request, tmp_path_factory) -> Trained:
    write, settings = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    write(folder / "base")
    return train(folder, settings)


def train(folder: Path, settings: dict[str, Any]) -> Trained:
    """Draws an adapter of a base in ``folder / "base"`` and lets PEFT write it."""
    with open_source(folder / "base") as source:
        reference = source.spec.reference(source.config)
    model = get_peft_model(reference.load(folder / "base", torch.float32), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder / "adapter")
    inputs = [reference.inputs(sample, torch.float32) for sample in reference.samples()[:2]]
    logits, modules = logits_of(model, inputs), awake(model)
    merged = dict(model.merge_and_unload().named_parameters())
    return Trained(folder / "base", folder / "adapter", inputs, logits, modules, merged)


def logits_of(model: Any, inputs: list[dict[str, Tensor]]) -> list[Tensor]:
    with torch.no_grad():
        return [model.eval()(**one).logits[0] for one in inputs]


def awake(model: Any) -> set[str]:
    """Modules that PEFT adapts or keeps a trained copy of."""
    return {name for name, m in model.named_modules() if hasattr(m, "lora_A") or hasattr(m, "modules_to_save")}


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for left, right in zip(ours, theirs, strict=True):
        assert float((left - right).abs().max() / right.abs().max()) < LOGITS


def test_peft_adapter_in_and_out(trained: Trained, tmp_path):
    with open_source(trained.adapter) as source:
        export_adapter(source, tmp_path / "out")
        export_hf(source, tmp_path / "merged")
        reference = source.spec.reference(source.config)
    theirs, ours = load_file(trained.adapter / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    # PEFT keeps embedding and head of the base beside a pair on the head; they are the base's own.
    copies = {name for name in theirs if "embed_tokens" in name or "lm_head.base_layer" in name}
    assert ours.keys() == theirs.keys() - copies
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that are missing
        model = AutoPeftModel.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert awake(model) == trained.modules
    assert_close(logits_of(model, trained.inputs), trained.logits)
    merged = reference.load(tmp_path / "merged", torch.float32)
    assert_close(logits_of(merged, trained.inputs), trained.logits)
    assert all(torch.equal(tensor, trained.merged[name]) for name, tensor in merged.named_parameters())
    assert (tmp_path / "out" / "tokenizer_config.json").exists() and not (tmp_path / "out" / "config.json").exists()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Trained:
    """An adapter of the language model of an InternVL, with a projector trained in full."""
    folder = tmp_path_factory.mktemp("qwen")
    write_tiny_internvl3(folder / "base")
    settings = dict(target_modules=["q_proj", "v_proj"], exclude_modules=r".*vision_tower.*", r=4, lora_alpha=8)
    return train(folder, settings | {"modules_to_save": ["multi_modal_projector"]})


def edited(trained: Trained, folder: Path, config: dict[str, Any] | None = None, **tensors: Tensor | None) -> Path:
    """A copy of an adapter with settings and tensors changed, added, or (None) left out."""
    folder.mkdir(exist_ok=True)
    content = json.loads((trained.adapter / CONFIG).read_text()) | (config or {})
    (folder / CONFIG).write_text(json.dumps(content))
    kept = load_file(trained.adapter / WEIGHTS) | tensors
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, folder / WEIGHTS)
    return folder


Q = "base_model.model.model.language_model.layers.1.self_attn.q_proj"
PROJECTOR = "base_model.model.model.multi_modal_projector.linear_1.bias"
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], str]] = {
    "no B": ({}, {f"{Q}.lora_B.weight": None}, r"q_proj.lora_B: missing"),
    "no pair": ({}, {f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None}, r"1.self_attn.q_proj: missing, .* targets it"),
    "part of a module": ({}, {PROJECTOR: None}, r"linear_1.bias: missing, .* modules_to_save"),
    "unknown linear": ({}, {Q.replace("q_proj", "x_proj") + ".lora_A.weight": torch.zeros(4, 64)}, "no such linear"),
    "unknown tensor": ({}, {Q.replace("q_proj", "thing.weight"): torch.zeros(4)}, r"thing.weight: unknown"),
    "A of another width": ({}, {f"{Q}.lora_A.weight": torch.zeros(4, 32)}, r"A \[4, 32\] and B \[64, 4\] do not fit"),
    "other rank": ({"r": 8}, {}, r"A \[4, 64\] and B \[64, 4\] do not fit rank 8"),
    "other shape": ({}, {PROJECTOR: torch.zeros(3)}, r"linear_1.bias: \[3\], the model has \[64\]"),
    "two spellings": (
        {},
        {"base_model.model.language_model.model.layers.1.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)},
        "a second lora_A",
    ),
    "DoRA": ({"use_dora": True}, {}, "use_dora True is not built"),
    "another method": ({"peft_type": "LOHA"}, {}, "only LORA is"),
    "changed base": ({"init_lora_weights": "pissa"}, {}, "changes the base weights"),
    "rows of tokens": ({"trainable_token_indices": {"embed_tokens": [3]}}, {}, "trainable_token_indices .* is not built"),
    "embedding of another base": (
        {}, {"base_model.model.model.language_model.embed_tokens.weight": torch.zeros(402, 64)}, "trained on another base",
    ),
    "bias that is not there": ({"bias": "all"}, {}, r"bias: missing, .* says bias all"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_adapter_that_does_not_fit_is_refused(case, qwen: Trained, tmp_path):
    config, tensors, message = REFUSED[case]
    with pytest.raises(ConversionError, match=message):
        open_source(edited(qwen, tmp_path / "adapter", config, **tensors))


def test_adapter_of_another_base_is_refused(qwen: Trained, tmp_path):
    with open_source(qwen.adapter) as source:
        export_adapter(source, tmp_path / "adapter")
    write_tiny_internvl3(tmp_path / "other", seed=1)
    with pytest.raises(ConversionError, match=r"was trained on another base \(.*base\) than .*other: 1\d\d of 192"):
        open_source(tmp_path / "adapter", base=tmp_path / "other")
    write_tiny_internvl3(tmp_path / "wider", text={"hidden_size": 32, "intermediate_size": 48})
    with pytest.raises(ConversionError, match=r"do not fit rank 4 of .* and a weight \[32, 32\]"):
        open_source(qwen.adapter, base=tmp_path / "wider")
    edited(qwen, tmp_path / "nameless", {"base_model_name_or_path": None})
    with pytest.raises(ConversionError, match="give --base DIR"):
        open_source(tmp_path / "nameless")


def test_written_names_wake_up_nothing_else(qwen: Trained, tmp_path):
    """The tower has modules of the same last names: whole names are written, and PEFT adapts just them."""
    with open_source(qwen.adapter) as source:
        export_adapter(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["target_modules"][0] == "model.language_model.layers.0.self_attn.q_proj"
    assert config["modules_to_save"] == ["model.multi_modal_projector"] and config["base_model_name_or_path"] == str(
        qwen.base
    )
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert awake(model) == qwen.modules
    assert_close(logits_of(model, qwen.inputs), qwen.logits)


OLD_NAMES = {"model.language_model.": "language_model.model.", "model.multi_modal_projector.": "multi_modal_projector."}


def test_names_of_older_transformers_are_read(qwen: Trained, tmp_path):
    """Adapters from when the modules were called as in the files: PEFT would load them in part, with a warning."""
    renamed = {}
    for name, tensor in load_file(qwen.adapter / WEIGHTS).items():
        for new, old in OLD_NAMES.items():
            name = name.replace(f"base_model.model.{new}", f"base_model.model.{old}")
        renamed[name.replace(".lora_A.", ".lora_A.default.")] = tensor
    folder = tmp_path / "old"
    folder.mkdir()
    save_file(renamed, folder / WEIGHTS)
    (folder / CONFIG).write_text((qwen.adapter / CONFIG).read_text())
    with open_source(folder) as old, open_source(qwen.adapter) as new:
        assert old.adapter.pairs.keys() == new.adapter.pairs.keys()
        assert all(torch.equal(old.read(name), new.read(name)) for name in new.infos)
        export_adapter(old, tmp_path / "out")
    ours, theirs = load_file(tmp_path / "out" / WEIGHTS), load_file(qwen.adapter / WEIGHTS)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
