"""Adapters of PEFT in and out: every tensor equal, nothing else wakes up, the same logits; and what is refused."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from megatron_vlm.conversion.convert import export_hf
from megatron_vlm.conversion.source import open_source
from megatron_vlm.peft.adapter_io import WEIGHTS
from megatron_vlm.peft.export import export_adapter
from megatron_vlm.testing.twin_internvl3 import write_tiny_internvl3
from megatron_vlm.testing.twin_llava_internlm2 import write_tiny_llava
from megatron_vlm.testing.twins import write_tiny_idefics2

LOGITS = 1e-5  # of the largest; measured: 2e-6
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
