"""InternVL 2 to 3.5 against transformers in fp32, eager attention: logits, loss, gradients; and that the bar shows mistakes."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import InternVLForConditionalGeneration

from megatron_vlm import registry
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.layers.norm import HeadRMSNorm, LayerNorm, RMSNorm
from megatron_vlm.layers.vision import internvit
from megatron_vlm.models.families.internvl3 import model as internvl3
from megatron_vlm.models.families.internvl3.mapping import NAMES
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.mutations import assert_noticed, mutated_logits
from megatron_vlm.testing.parity import hf_reference
from megatron_vlm.testing.parity_check import Bars, check_parity
from megatron_vlm.testing.twins.internvl3 import hf_inputs, make_samples, write_tiny_internvl2, write_tiny_internvl3

BARS = Bars()  # measured: logits 2.7e-6 of the largest, 2.3 x noise, loss 1.4e-7, gradients 5.3e-6
TIMES = 30

# Tiles of each image, and text tokens: 0, 1 and 3 images in one row.
SAMPLES = [([3], 14), ([], 23), ([1, 2, 5], 9), ([1], 5)]
SIX_B = dict(num_attention_heads=3, attention_bias=False, use_qk_norm=True, norm_type="rms_norm")
QWEN3 = dict(model_type="qwen3", head_dim=12, num_key_value_heads=2)
TWINS = {
    "300m": ({}, None),
    "qwen3": (dict(text=QWEN3), None),
    "internlm2": (dict(text=dict(max_position_embeddings=40)), None),  # one sample beyond these, under dynamic NTK
    "6b": (dict(vision=SIX_B), None),
    "tied": (dict(tie=True), None),
    "interpolated": ({}, 48),  # tiles larger than those that the positions were learned on
    "deep": (dict(vision=dict(num_hidden_layers=6)), None),
}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Name -> (directory, HF model, model config, samples)."""
    made = {}

    def make(name):
        if name not in made:
            options, tile = TWINS[name]
            directory = str(tmp_path_factory.mktemp(name))
            if name == "internlm2":
                hf, directory = write_tiny_internvl2(Path(directory), **options), f"{directory}/hf"
            else:
                hf = write_tiny_internvl3(directory, **options)
            config = registry.get("internvl3").config(hf.config.to_dict())
            made[name] = directory, hf, config, make_samples(config, SAMPLES, tile=tile)
        return made[name]

    return make


def no_true_gradient(name):
    """A constant added to every key changes no attention weight where there is no RoPE."""
    return name.startswith("vision_tower") and name.endswith("k_proj.bias")


@pytest.mark.parametrize("name", [name for name in TWINS if name != "deep"])
def test_forward_and_gradients_equal_hf(twins, name):
    directory, hf, _, samples = twins(name)
    loss, logits, grads = hf_reference(hf, samples, inputs=hf_inputs)
    exact = hf_reference(copy.deepcopy(hf).double(), samples, gradients=False, inputs=hf_inputs)[1]
    theirs = loss, logits, {NAMES.file_name(n): g for n, g in grads.items()}
    check_parity(name, directory, samples, theirs, exact, BARS, no_true_gradient)


def transposed_shuffle(patches, tiles, factor):
    """Version v1: the grid of features is left transposed."""
    out = internvit.pixel_shuffle(patches, tiles, factor)
    side = int((len(out) // tiles) ** 0.5)
    return out.view(tiles, side, side, -1).transpose(1, 2).reshape(out.shape)


def one_segment(counts, device):
    return torch.tensor([0, sum(counts)], dtype=torch.int32, device=device)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def norm_per_head(self, x):
    """Queries and keys normed head by head, as other models do it."""
    weight = self.weight.view(x.shape[-2:])
    return weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


def norm_together(self, x):
    """Queries and keys normed over all heads, as InternViT-6B's are."""
    return self.weight * x * torch.rsqrt(x.square().mean((-2, -1), keepdim=True) + self.eps)


def scale_eps(module, kind, factor):
    for part in module.modules():
        if isinstance(part, kind):
            part.eps *= factor


def mutate(name, model, batch, patch):
    """Makes one mistake; returns the batch to run."""
    layers = model.vision_model.encoder.layers
    if name == "tower gelu tanh":
        for layer in layers:
            layer.mlp.activation_func = gelu_tanh
    elif name == "connector gelu tanh":
        model.connector.mlp.activation_func = gelu_tanh
    elif name == "pixel shuffle v1":
        patch(internvl3, "pixel_shuffle", transposed_shuffle)
    elif name == "attention across tiles":
        patch(internvit, "cumulative", one_segment)
    elif name == "no layer scale":
        for layer in layers:
            layer.mlp_bda.scale.data.fill_(1.0)
    elif name == "heads not normed":
        for layer in model.language_model.decoder.layers:
            layer.self_attention.q_layernorm = layer.self_attention.k_layernorm = nn.Identity()
    elif name == "heads normed together":
        patch(HeadRMSNorm, "forward", norm_together)
    elif name == "norms of queries and keys exchanged":
        for layer in model.language_model.decoder.layers:
            attention = layer.self_attention
            attention.q_layernorm, attention.k_layernorm = attention.k_layernorm, attention.q_layernorm
    elif name == "no bias of keys and queries in the decoder":
        for layer in model.language_model.decoder.layers:
            layer.self_attention.linear_qkv.bias.data.zero_()
    elif name == "positions shifted by the class token":
        model.vision_model.position_embedding.data = model.vision_model.position_embedding.data.roll(1, 1)
    elif name == "thumbnail first":
        return dataclasses.replace(batch, pixels=tuple(p.roll(p.shape[2], 1) for p in batch.pixels))
    elif name == "no norm in the connector":
        model.connector.layernorm = nn.Identity()
    elif name == "attention across samples":
        total = batch.starts[-1]
        return dataclasses.replace(batch, cu_seqlens=torch.tensor([0, total], dtype=torch.int32), starts=(0, total))
    elif name == "norm per head":
        patch(internvit.WidthRMSNorm, "forward", norm_per_head)
    elif name == "tower eps x 10":
        scale_eps(model.vision_model, LayerNorm, 10)
    elif name == "connector eps / 10":
        scale_eps(model.connector, LayerNorm, 0.1)
    elif name == "decoder eps x 10":
        scale_eps(model.language_model, RMSNorm, 10)
    return batch


MUTATIONS = [
    "tower gelu tanh",
    "connector gelu tanh",
    "pixel shuffle v1",
    "attention across tiles",
    "no layer scale",
    "no bias of keys and queries in the decoder",
    "positions shifted by the class token",
    "thumbnail first",
    "no norm in the connector",
    "attention across samples",
]
HEAD_MUTATIONS = ["heads not normed", "heads normed together", "norms of queries and keys exchanged"]
EPS_MUTATIONS = ["tower eps x 10", "connector eps / 10", "decoder eps x 10"]


def mutated(directory, row, names):
    return mutated_logits(mutate, directory, row, names)


def check(directory, hf, samples, names):
    expected = hf_reference(hf, samples, gradients=False, inputs=hf_inputs)[1]
    (logits,) = run_distributed(mutated, directory, row_from_samples(samples), names)
    assert_noticed(logits, expected, names, bar=BARS.logits, times=TIMES)


def test_mistakes_show(twins):
    directory, hf, _, samples = twins("deep")
    check(directory, hf, samples, MUTATIONS)
    directory, hf, _, samples = twins("6b")
    check(directory, hf, samples, ["norm per head"])
    directory, hf, _, samples = twins("qwen3")
    check(directory, hf, samples, HEAD_MUTATIONS)


def test_wrong_eps_shows(tmp_path):
    """On a twin whose residual streams start small: at unit scale nobody can see an epsilon."""
    hf = write_tiny_internvl3(tmp_path)
    small = ("embed_tokens.weight", "projection.weight", "projection.bias", "position_embeddings", "cls_token")
    for name, parameter in hf.named_parameters():
        if name.endswith(small):
            parameter.data.mul_(0.005)
        if "lambda_" in name or "linear_2" in name:  # and stay small
            parameter.data.mul_(0.02)
    hf.save_pretrained(tmp_path)
    hf = InternVLForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    config = registry.get("internvl3").config(hf.config.to_dict())
    check(str(tmp_path), hf, make_samples(config, SAMPLES), EPS_MUTATIONS)
