"""Adapters between the layouts of a family, from checkpoints of any layout, XTuner's folders and models saved with PEFT inside.

What an adapter does to the weights is computed here from its files alone, by the published names.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file, save_file

from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.models.assembling import generator
from megatron_vlm.peft.adapter_io import WEIGHTS
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.peft.merge import continued
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.testing.twins.internlm2 import write_tiny_internlm2
from megatron_vlm.testing.twins.internvl3 import write_chat_layout, write_tiny_internvl3
from megatron_vlm.testing.twins.peft import multiply_dequantised
from megatron_vlm.testing.twins.xcomposer2 import write_tiny_xcomposer2
from tests.peft.adapter_runs import adapter_of, assert_same, checkpoint, make, merged

OWN = {
    "internlm2": (
        write_tiny_internlm2,
        dict(target_modules=("wqkv", "wo", "w1", "w2", "w3", "output"), r=6, alpha=3.0),
        ["output", "w1", "w2", "w3", "wo", "wqkv"],
    ),
    "xcomposer2": (
        write_tiny_xcomposer2,
        dict(
            target_modules=("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
            modules_to_save=("vision_proj",), r=4, alpha=4.0,
        ),
        ["w1", "w2", "w3", "wo", "wqkv"],
    ),
    "internvl_chat": (
        lambda folder: write_chat_layout(folder, write_tiny_internvl3(folder.parent / "native")),
        dict(target_modules=("attn.qkv", "attn.proj", "mlp.fc1", "q_proj", "gate_proj", "mlp1.1"), r=4, alpha=8.0),
        ["fc1", "gate_proj", "mlp1.1", "proj", "q_proj", "qkv"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", OWN)
def test_own_names_and_merged_weights(family, tmp_path):
    """What tp 2, pp 2 wrote is exported as what one process wrote, under the model's own names; the merged model has it."""
    write, settings, names = OWN[family]
    (tmp_path / "base").mkdir()
    write(tmp_path / "base")
    for layout, sizes in {"one": {}, "four": {"tp": 2, "pp": 2}}.items():
        run = checkpoint(tmp_path / layout, tmp_path / "base", **sizes, **settings)
        mg2hf(run, tmp_path / f"{layout}_adapter", adapter_only=True)
        mg2hf(run, tmp_path / f"{layout}_merged", merge=True)
    files = [tmp_path / f"{layout}_adapter" / WEIGHTS for layout in ("one", "four")]
    config, adapter = adapter_of(files[0].parent)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert config["target_modules"] == names
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    base = load_file(tmp_path / "base" / "model.safetensors")
    for layout in ("one", "four"):
        assert_same(load_file(tmp_path / f"{layout}_merged" / "model.safetensors"), merged(base, config, adapter))
    # In again, and out.
    with open_source(tmp_path / "four_adapter") as source:
        assert source.adapter.pairs.keys() == {n.removesuffix(".lora_A.weight") for n in adapter if ".lora_A." in n}
    mg2hf(tmp_path / "four_adapter", tmp_path / "again", adapter_only=True)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == files[0].read_bytes()


LAYOUTS: dict[str, tuple[Callable[[Path], Any], str, str, dict[str, Any]]] = {
    "fused falls into parts": (
        write_tiny_internlm2,
        "llama",
        "LlamaForCausalLM",
        dict(target_modules=("wqkv", "w1", "wo", "output"), r=4, alpha=2.0, rslora=True),
    ),
    "chat to transformers": (
        lambda folder: write_chat_layout(folder, write_tiny_internvl3(folder.parent / "native")),
        "hf",
        "InternVLForConditionalGeneration",
        dict(target_modules=("attn.qkv", "q_proj", "mlp1.3"), r=4, alpha=8.0, modules_to_save=("mlp1.1",)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUTS)
def test_another_layout_in_peft(case, tmp_path):
    """A fused linear's pair becomes one for each part, which PEFT loads; the same model comes out as by merging."""
    import transformers

    write, layout, name, settings = LAYOUTS[case]
    (tmp_path / "base").mkdir()
    write(tmp_path / "base")
    run = checkpoint(tmp_path / "run", tmp_path / "base", tp=2, **settings)
    mg2hf(tmp_path / "base", tmp_path / "other", naming=layout)
    mg2hf(run, tmp_path / "adapter", adapter_only=True, naming=layout, base=tmp_path / "other")
    mg2hf(run, tmp_path / "merged", merge=True, naming=layout)
    load = getattr(transformers, name).from_pretrained
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(load(tmp_path / "other"), tmp_path / "adapter").merge_and_unload()
    assert_same(dict(model.named_parameters()), dict(load(tmp_path / "merged").named_parameters()))
    with pytest.raises(
        ConversionError, match="names a base of its own layout: give the model in that layout with --base"
    ):
        mg2hf(run, tmp_path / "no", adapter_only=True, naming=layout)


def test_model_saved_with_its_adapter_inside(tmp_path):
    """The original's use_llm_lora and use_backbone_lora: merged where it is opened; or trained on, base and adapter apart."""
    write_chat_layout(tmp_path / "base", write_tiny_internvl3(tmp_path / "native"))
    plain = load_file(tmp_path / "base" / "model.safetensors")
    wrapped, expected = {}, dict(plain)
    for name, tensor in plain.items():
        part, _, rest = name.partition(".")
        new = f"{part}.base_model.model.{rest}" if part in ("language_model", "vision_model") else name
        if name.endswith(("q_proj.weight", "q_proj.bias", "qkv.weight", "qkv.bias")):
            module, _, kind = new.rpartition(".")
            new = f"{module}.base_layer.{kind}"
            if kind == "weight":
                a, b = (
                    0.1 * torch.randn(s, generator=generator(1, f"{name}{s}"))
                    for s in ((4, tensor.shape[1]), (tensor.shape[0], 4))
                )
                wrapped |= {f"{module}.lora_A.default.weight": a, f"{module}.lora_B.default.weight": b}
                expected[name] = tensor + 2.0 * b @ a
        wrapped[new] = tensor
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"use_llm_lora": 4, "use_backbone_lora": 4}
    folder = tmp_path / "wrapped"
    folder.mkdir()
    for path in (tmp_path / "base").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    save_file(wrapped, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    hf2mg(folder, tmp_path / "mg", tp=2)
    mg2hf(tmp_path / "mg", tmp_path / "merged")
    assert_same(load_file(tmp_path / "merged" / "model.safetensors"), expected)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["use_llm_lora"] == 0
    with open_source(folder) as source:
        base, resolved, _ = continued(PeftConfig(adapter=str(folder)), source)
        assert resolved.target_modules == ("q_proj", "qkv") and (resolved.r, resolved.alpha) == (4, 8.0)
        assert torch.equal(base.read("vision_model.class_embedding"), plain["vision_model.embeddings.class_embedding"])
    with pytest.raises(ConversionError, match="give the model that it came from"):
        mg2hf(folder, tmp_path / "no", adapter_only=True)
    mg2hf(folder, tmp_path / "adapter", adapter_only=True, base=tmp_path / "base")
    _, tensors = adapter_of(tmp_path / "adapter")
    assert "language_model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors


def test_flags_that_say_nothing(tmp_path):
    base = make(tmp_path / "base")
    write_tiny_internlm2(base)
    run = checkpoint(tmp_path / "run", base, target_modules=("wqkv",))
    for options, message in (
        ({}, "holds an adapter: --merge writes"),
        ({"merge": True, "adapter_only": True}, "give one of them"),
        ({"adapter_only": True, "naming": "lama"}, "did you mean|offers llama"),
    ):
        with pytest.raises(ConfigError, match=message):
            mg2hf(run, tmp_path / "out", **options)
    for options in ({"merge": True}, {"adapter_only": True}):
        with pytest.raises(ConfigError, match="holds a whole model, and no adapter"):
            mg2hf(base, tmp_path / "out", **options)
    with pytest.raises(ConfigError, match="is a whole model, which has no base"):
        open_source(base, base=base)


def test_added_tokens_come_along(tmp_path):
    """A base whose vocabulary was extended for the run: PEFT resizes the original and gets the rows from the adapter."""
    from transformers import Idefics2ForConditionalGeneration

    write_tiny_idefics2(tmp_path / "original", end_of_utterance=False)
    hf2mg(tmp_path / "original", tmp_path / "mg", end_of_utterance=True, tp=2)
    run = checkpoint(
        tmp_path / "run", tmp_path / "mg", tp=2, target_modules=r".*text_model.*(q_proj|v_proj)", r=4, alpha=8.0
    )
    with pytest.raises(ConversionError, match="no Hugging Face directory that PEFT could load"):
        mg2hf(run, tmp_path / "no", adapter_only=True)
    mg2hf(run, tmp_path / "adapter", adapter_only=True, base=tmp_path / "original")
    mg2hf(run, tmp_path / "merged", merge=True)
    names = {name for name in adapter_of(tmp_path / "adapter")[1] if ".lora_" not in name}
    assert names == {"model.text_model.embed_tokens.weight", "lm_head.weight"}
    model = AutoPeftModel.from_pretrained(tmp_path / "adapter").merge_and_unload()
    expected = Idefics2ForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert_same(dict(model.named_parameters()), dict(expected.named_parameters()))
    # Of the extended base itself, no rows come along.
    mg2hf(tmp_path / "mg", tmp_path / "extended")
    mg2hf(run, tmp_path / "small", adapter_only=True, base=tmp_path / "extended")
    assert all(".lora_" in name for name in adapter_of(tmp_path / "small")[1])
    write_tiny_idefics2(tmp_path / "other", seed=5)
    with pytest.raises(ConversionError, match="has other weights than the model that the adapter was trained on"):
        mg2hf(run, tmp_path / "no", adapter_only=True, base=tmp_path / "other")


def test_base_in_4_bits(tmp_path):
    """The adapter of a run goes onto bitsandbytes' 4-bit base: what it adds is what it adds to the weights they stand for."""
    import bitsandbytes
    from transformers import BitsAndBytesConfig, Idefics2ForConditionalGeneration

    write_tiny_idefics2(tmp_path / "base", ffn=128)
    run = checkpoint(tmp_path / "run", tmp_path / "base", target_modules=("q_proj", "down_proj", "fc1"), r=4, alpha=8.0)
    mg2hf(run, tmp_path / "adapter", adapter_only=True)
    skipped = ["lm_head", ".*vision_model.*", ".*connector.*"]
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
    load = Idefics2ForConditionalGeneration.from_pretrained
    small, dense = load(tmp_path / "base", quantization_config=config, dtype=torch.float32), load(tmp_path / "base")
    linears = multiply_dequantised(small)
    assert len(linears) == 28
    for name, module in linears.items():
        weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        dense.get_submodule(name).weight.data.copy_(weight)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        before = dense(input_ids=ids).logits
        ours, theirs = (
            PeftModel.from_pretrained(m, tmp_path / "adapter").eval()(input_ids=ids).logits for m in (small, dense)
        )
    assert float((theirs - before).abs().max()) > 0.1
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def test_base_stored_in_4_bits(tmp_path):
    """What was trained on stored NF4 is exported, and merged into the full weights, of the model that these were made from."""
    write_tiny_internlm2(make(tmp_path / "base"))
    hf2mg(tmp_path / "base", tmp_path / "nf4", quantize="nf4", tp=2)
    run = checkpoint(tmp_path / "run", tmp_path / "nf4", tp=2, target_modules=("wqkv", "w2"), r=4, alpha=8.0)
    with pytest.raises(ConversionError, match="holds linears in 4 bits"):
        mg2hf(run, tmp_path / "no", merge=True)
    mg2hf(run, tmp_path / "merged", merge=True, base=tmp_path / "base")
    mg2hf(run, tmp_path / "adapter", adapter_only=True, base=tmp_path / "base")
    expected = merged(load_file(tmp_path / "base" / "model.safetensors"), *adapter_of(tmp_path / "adapter"))
    assert_same(load_file(tmp_path / "merged" / "model.safetensors"), expected)
    mg2hf(run, tmp_path / "named", adapter_only=True, base="someone/internlm2")
    assert adapter_of(tmp_path / "named")[0]["base_model_name_or_path"] == "someone/internlm2"
    with open_source(tmp_path / "nf4") as nf4:
        base, config, _ = continued(PeftConfig(adapter=str(tmp_path / "adapter"), quantize="nf4"), nf4)
    assert base is nf4 and config.target_modules == ("w2", "wqkv")
