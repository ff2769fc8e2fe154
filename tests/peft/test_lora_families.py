"""LoRA in the other families: equal to PEFT where HF has the model, elsewhere to the same model with B A in its weights."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import (
    adapted_mapping,
    adapted_plan,
    build_for_test,
    gradient_errors,
    layout_logits,
    layout_run,
    merge_gradients,
)
from megatron_vlm.testing.twins import internlm2 as twin_internlm2
from megatron_vlm.testing.twins import internvl3 as twin_internvl3
from megatron_vlm.testing.twins import llava_internlm2 as twin_llava_internlm2
from megatron_vlm.testing.twins import xcomposer2 as twin_xcomposer2
from megatron_vlm.testing.twins.peft import peft_gradients, peft_twin

LOGITS = 2e-5  # of the largest logit
LOSS = 2e-6
GRADIENT = 1e-4


QWEN3 = dict(text=dict(model_type="qwen3", head_dim=12))


def write_internvl2(directory):
    twin_internvl3.write_tiny_internvl2(directory / "both")
    shutil.copytree(directory / "both" / "chat", directory, dirs_exist_ok=True)


def write_chat(directory):
    model = twin_internvl3.write_tiny_internvl3(directory / "native", **QWEN3)
    twin_internvl3.write_chat_layout(directory, model)


def image_samples(module):
    return lambda config, _: module.make_samples(config, [([2], 9), ([], 12)])


FAMILIES = {
    # name: writes the twin, makes samples of (model config, HF config), settings
    "internlm2": (
        twin_internlm2.write_tiny_internlm2,
        lambda config, _: twin_internlm2.make_samples(config.text.vocab_size, [17, 9]),
        dict(target_modules=("wqkv", "wo", "w1", "w2", "w3", "output"), r=4, alpha=2),
    ),
    "xcomposer2": (
        lambda d: twin_xcomposer2.write_tiny_xcomposer2(d, variant="4khd-7b"),
        lambda _, hf: twin_xcomposer2.make_samples(hf, [([(1, 2)], 14), ([], 9)]),
        dict(
            target_modules=("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
        ),
    ),
    "internvl_chat": (
        write_chat,
        image_samples(twin_internvl3),
        dict(target_modules=("attn.qkv", "attn.proj", "fc1", "q_proj", "up_proj", "mlp1.1"), r=3, vision_r=2),
    ),
    "internvl2": (
        write_internvl2,
        image_samples(twin_internvl3),
        dict(target_modules=("attention.wqkv", "wo", "w1", "w2", "w3", "output", "attn.proj"), r=3),
    ),
    "llava_internlm2": (
        twin_llava_internlm2.write_tiny_llava_internlm2,
        lambda config, _: twin_llava_internlm2.make_samples(config, [(1, 17), (0, 12)]),
        dict(target_modules=("wqkv", "w3", "output", "q_proj", "fc2"), names="xtuner"),
    ),
}


def adapted_and_merged(directory, rows, parallel, settings):
    """On a rank: logits of each row with random pairs, and without them, B A added to the whole weights before they were cut."""
    from megatron_vlm.peft.lora import fill

    topology, source, adapted, _ = build_for_test(directory, parallel, {}, {"tensors": {}, **settings})
    plan, entries = adapted_plan(source, settings), adapted_mapping(source, settings, topology.tp).by_name()
    generator, pairs, merged = torch.Generator().manual_seed(5), {}, {}
    for target in plan.targets:
        a = 0.1 * torch.randn(target.r, target.inputs, generator=generator)
        b = 0.1 * torch.randn(target.shape[0], target.r, generator=generator)
        pairs |= {f"{target.name}.a": a, f"{target.name}.b": entries[f"{target.name}.b"].to_full([b])}
        whole = merged.setdefault(target.entry.name, source.read(target.entry.name))
        parts = target.entry.from_full(whole)
        parts[target.index] = parts[target.index] + target.scaling * b @ a
        full = target.entry.to_full(parts)
        merged[target.entry.name] = torch.cat([full, whole[len(full) :]])
    fill(adapted, pairs)
    (model,) = adapted
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    _, _, whole, _ = build_for_test(directory, parallel, {})
    fill(whole, merged)
    (plain,) = whole
    with torch.no_grad():
        return [[m.eval().logits(batch) for batch in rows] for m in (model, plain)], trained


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "xcomposer2" else pytest.mark.full) for name in FAMILIES]
)
def test_equals_the_merged_model(tmp_path, name):
    write, samples, settings = FAMILIES[name]
    write(tmp_path)
    with open_source(tmp_path) as source:
        hf_config = json.loads(Path(tmp_path, "config.json").read_text())
        rows = [row_from_samples(samples(source.config, hf_config))]
        plan = adapted_plan(source, settings)
    parallel = dict(tensor_model_parallel_size=2)
    ((adapted,), (merged,)), trained = run_distributed(
        adapted_and_merged, str(tmp_path), rows, parallel, settings, tp=2
    )[0]
    off = float((adapted - merged).abs().max() / merged.abs().max())
    print(f"{name}: {len(plan.targets)} pairs, logits off {off:.1e}")
    assert off <= LOGITS
    # Partial LoRA is architecture: frozen, as is all else.
    assert trained and all(".lora." in parameter for parameter in trained)
    # Layers that never run keep their pairs as they start.
    never = sum(".unused_layers." in target.name for target in plan.targets)
    assert len(trained) == 2 * (len(plan.targets) - never)
    assert (never > 0) == (name == "llava_internlm2")


@pytest.mark.parametrize(
    ("module", "write", "inputs", "specs"),
    [
        (twin_llava_internlm2, twin_llava_internlm2.write_tiny_llava, "llava_inputs", [(1, 17), (0, 20)]),
        pytest.param(
            twin_internvl3,
            partial(twin_internvl3.write_tiny_internvl3, **QWEN3),
            "hf_inputs",
            [([3], 14), ([], 23)],
            marks=pytest.mark.full,
        ),
    ],
    ids=["llava", "internvl3"],
)
def test_equals_peft(tmp_path, module, write, inputs, specs):
    """Names in memory that are not those of the files; a tower of which layers never run."""
    hf = write(str(tmp_path))
    settings = dict(target_modules="all-linear", modules_to_save=("linear_2",), r=3, alpha=6)
    with open_source(tmp_path) as source:
        samples = module.make_samples(source.config, specs)
        model, tensors = peft_twin(hf, settings)
        loss, logits, grads = peft_gradients(model, samples, getattr(module, inputs))
        rows = [row_from_samples(samples)]
        peft = {"tensors": tensors, **settings}
        (ours,) = run_distributed(layout_logits, str(tmp_path), rows, {}, {}, peft)
        results = run_distributed(layout_run, str(tmp_path), rows, {}, {}, 0, 1e-3, peft)
        mapping = adapted_mapping(source, settings, 1)
        our_loss, our_grads = merge_gradients(results, mapping, source.config.text.vocab_size)
        our_grads = {mapping.module_name(name): grad for name, grad in our_grads.items()}
    never = {name for name, grad in grads.items() if name not in our_grads and not grad.any()}
    assert len(never) == (0 if module is twin_internvl3 else 2 * 6)
    errors = gradient_errors(our_grads, {name: grad for name, grad in grads.items() if name not in never})
    worst = max((error, name) for name, error in errors.items())
    off = float((ours["logits"][0] - logits).abs().max() / logits.abs().max())
    print(f"logits off {off:.1e}, loss {abs(our_loss - loss) / loss:.1e}, worst gradient {worst[0]:.1e} {worst[1]}")
    assert off <= LOGITS and abs(our_loss - loss) <= LOSS * loss and worst[0] <= GRADIENT
