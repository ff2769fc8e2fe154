"""LLaVA against transformers: logits, loss and every gradient in fp32, eager attention; and that the bar shows mistakes."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_vlm import registry
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.layers.norm import LayerNorm, RMSNorm
from megatron_vlm.layers.vision import clip
from megatron_vlm.models.families.llava_internlm2.mapping import NAMES
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.mutations import assert_noticed, mutated_logits
from megatron_vlm.testing.parity import hf_reference
from megatron_vlm.testing.parity_check import Bars, check_parity
from megatron_vlm.testing.twins.llava_internlm2 import (
    llava_inputs,
    make_samples,
    write_tiny_llava,
    write_tiny_llava_internlm2,
)

BARS = Bars()  # measured: logits 1.6e-6 of the largest, 1.03 x noise, loss 1.4e-7, gradients 3.2e-6
TIMES = 30
SAMPLES = [(1, 17), (0, 40), (3, 9)]
TWINS = {
    "internlm2": write_tiny_llava_internlm2,
    "llama": write_tiny_llava,
    "llama_tied": lambda directory: write_tiny_llava(directory, tie=True, num_attention_heads=3),
}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Name -> (directory, HF model, model config, samples)."""
    made = {}

    def make(name):
        if name not in made:
            directory = str(tmp_path_factory.mktemp(name))
            hf = TWINS[name](directory)
            config = registry.get("llava_internlm2").config(json.loads(Path(directory, "config.json").read_text()))
            made[name] = directory, hf, config, make_samples(config, SAMPLES)
        return made[name]

    return make


def no_true_gradient(name):
    """A constant added to every key changes no attention weight where there is no RoPE."""
    return name.startswith("vision_tower") and name.endswith("k_proj.bias")


@pytest.mark.parametrize("name", TWINS)
def test_forward_and_gradients_equal_hf(twins, name):
    directory, hf, _, samples = twins(name)
    loss, logits, grads = hf_reference(hf, samples, inputs=llava_inputs)
    exact = hf_reference(copy.deepcopy(hf).double(), samples, gradients=False, inputs=llava_inputs)[1]
    grads = {NAMES.file_name(n): g for n, g in grads.items()}
    # What the feature layer does not need is carried along and never trains: our side has no gradient of it.
    unused = {n for n in grads if ("layers.2." in n and "vision" in n) or "post_layernorm" in n}
    assert unused and not any(float(grads[n].norm()) for n in unused)
    theirs = loss, logits, {n: g for n, g in grads.items() if n not in unused}
    check_parity(name, directory, samples, theirs, exact, BARS, no_true_gradient)


def one_segment(counts, device):
    return torch.tensor([0, sum(counts)], dtype=torch.int32, device=device)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def scale_eps(module, kind, factor):
    for part in module.modules():
        if isinstance(part, kind):
            part.eps *= factor


def mutate(name, model, batch, patch):
    """Makes one mistake; returns the batch to run."""
    tower = model.vision_model
    if name == "tower gelu erf for quick_gelu":
        for layer in tower.encoder.layers:
            layer.mlp.activation_func = F.gelu
    elif name == "projector gelu tanh":
        model.connector.mlp.activation_func = gelu_tanh
    elif name == "last layer's features":
        tower.encoder.layers.append(tower.unused_layers[0])
    elif name == "norm after the features":
        patch(tower, "encoder", Then(tower.encoder, tower.unused_layernorm))
    elif name == "no norm before the encoder":
        patch(tower, "pre_layernorm", torch.nn.Identity())
    elif name == "position table shifted by the class token":
        tower.position_embedding.weight.data = tower.position_embedding.weight.data.roll(1, 0)
    elif name == "patches column by column":
        return dataclasses.replace(batch, pixels=tuple(p.transpose(1, 2) for p in batch.pixels))
    elif name == "attention across images":
        patch(clip, "cumulative", one_segment)
    elif name == "attention across samples":
        total = batch.starts[-1]
        return dataclasses.replace(batch, cu_seqlens=torch.tensor([0, total], dtype=torch.int32), starts=(0, total))
    elif name == "rope restarts inside a sample":
        positions = batch.position_ids.clone()
        start = batch.starts[1] + 20
        positions[start : batch.starts[2]] -= positions[start].clone()
        return dataclasses.replace(batch, tokens={**batch.tokens, "position_ids": positions})
    elif name == "tower eps x 10":
        scale_eps(tower, LayerNorm, 10)
    elif name == "decoder eps x 10":
        scale_eps(model.language_model, RMSNorm, 10)
    return batch


class Then(torch.nn.Module):
    """An encoder and a norm after it."""

    def __init__(self, encoder, norm):
        super().__init__()
        self.encoder, self.norm = encoder, norm

    def forward(self, *args, **kwargs):
        return self.norm(self.encoder(*args, **kwargs))


MUTATIONS = [
    "tower gelu erf for quick_gelu",
    "projector gelu tanh",
    "last layer's features",
    "norm after the features",
    "no norm before the encoder",
    "position table shifted by the class token",
    "patches column by column",
    "attention across images",
    "attention across samples",
    "rope restarts inside a sample",
]
EPS_MUTATIONS = ["tower eps x 10", "decoder eps x 10"]


def mutated(directory, row, names):
    return mutated_logits(mutate, directory, row, names)


def check(directory, hf, samples, names):
    expected = hf_reference(hf, samples, gradients=False, inputs=llava_inputs)[1]
    (logits,) = run_distributed(mutated, directory, row_from_samples(samples), names)
    assert_noticed(logits, expected, names, bar=BARS.logits, times=TIMES)


def test_mistakes_show(twins):
    directory, hf, _, samples = twins("internlm2")
    check(directory, hf, samples, MUTATIONS)


def test_wrong_eps_shows(tmp_path):
    """On a twin whose residual streams start small: at unit scale nobody can see an epsilon."""
    from transformers import LlavaForConditionalGeneration

    hf = write_tiny_llava(tmp_path)
    small = ("embed_tokens.weight", "patch_embedding.weight", "position_embedding.weight", "class_embedding")
    for name, parameter in hf.named_parameters():
        if name.endswith((*small, "linear_2.weight", "linear_2.bias")):
            parameter.data.mul_(0.02)
    hf.save_pretrained(tmp_path)
    hf = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    config = registry.get("llava_internlm2").config(hf.config.to_dict())
    check(str(tmp_path), hf, make_samples(config, SAMPLES), EPS_MUTATIONS)
