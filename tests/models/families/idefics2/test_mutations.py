"""The parity bar catches the classic mistakes at least 30-fold: each is made on purpose, and must show.

A bar that a wrong epsilon or GELU passes proves nothing. The eps cases use a twin whose residual streams start small (a
trained model has such channels), because at unit scale an epsilon cannot be seen by anybody.
"""

import dataclasses

import torch
import torch.nn.functional as F
from transformers import Idefics2ForConditionalGeneration

from megatron_vlm import registry
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.layers import perceiver
from megatron_vlm.layers.core_attention import CoreAttention
from megatron_vlm.layers.norm import LayerNorm, RMSNorm
from megatron_vlm.layers.vision import siglip
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.mutations import mutated_logits
from megatron_vlm.testing.parity import hf_reference, random_samples
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2

LOGITS = 2e-5  # the bar of test_model.py, of the largest logit
TIMES = 30
SAMPLES = [([(40, 50)], 14), ([], 23), ([(56, 56), (17, 33), (24, 48)], 9)]
SMALL = 0.02


def set_eps(model, part, norm, factor):
    for module in getattr(model, part).modules():
        if isinstance(module, norm):
            module.eps *= factor


def whole_row(counts, device):
    return torch.tensor([0, sum(counts)], dtype=torch.int32, device=device)


siglip_position_ids = siglip.position_ids


def transposed_table(rows, columns, side):
    """Position ids with rows and columns of the table swapped."""
    ids = siglip_position_ids(rows, columns, side)
    return ids % side * side + ids // side


class NoOrder(perceiver.Segments):
    """All contexts before all latents: right for one image, wrong for several."""

    def __init__(self, counts, num_latents, device):
        super().__init__(counts, num_latents, device)
        self.key_order = None


def shift_window(model, by):
    for module in model.modules():
        if isinstance(module, CoreAttention) and module.window is not None:
            module.window += by


def mutate(name, model, batch, patch):
    """Makes one mistake in the model, the module or the batch; returns the batch to run."""
    if name == "gelu erf for tanh":
        for layer in model.vision_model.encoder.layers:
            layer.mlp.activation_func = F.gelu
    elif name == "position table transposed":
        patch(siglip, "position_ids", transposed_table)
    elif name == "window + 1":
        shift_window(model, 1)
    elif name == "window - 1":
        shift_window(model, -1)
    elif name == "no key mask between images":
        patch(siglip, "cumulative", whole_row)
    elif name == "context and latents in another order":
        patch(perceiver, "Segments", NoOrder)
    elif name == "rope restarts inside a sample":
        # (That positions run on over the row instead changes nothing but round-off: RoPE is relative.)
        positions = batch.position_ids.clone()
        start = batch.starts[2] + 20
        positions[start:] -= positions[start].clone()
        return dataclasses.replace(batch, tokens={**batch.tokens, "position_ids": positions})
    elif name == "attention across samples":
        total = batch.starts[-1]
        return dataclasses.replace(batch, cu_seqlens=torch.tensor([0, total], dtype=torch.int32), starts=(0, total))
    elif name == "tower eps x 10":
        set_eps(model, "vision_model", LayerNorm, 10)
    elif name == "perceiver eps x 10":
        set_eps(model, "connector", RMSNorm, 10)
    elif name == "decoder eps / 10":
        set_eps(model, "language_model", RMSNorm, 0.1)
    return batch


MUTATIONS = [
    "gelu erf for tanh",
    "position table transposed",
    "window + 1",
    "window - 1",
    "no key mask between images",
    "context and latents in another order",
    "rope restarts inside a sample",
    "attention across samples",
]
EPS_MUTATIONS = ["tower eps x 10", "perceiver eps x 10", "decoder eps / 10"]


def mutated(directory, row, names):
    return mutated_logits(mutate, directory, row, names)


def differences(directory, hf, names):
    config = registry.get("idefics2").config(hf.config.to_dict())
    samples = random_samples(config, SAMPLES)
    expected = hf_reference(hf, samples, gradients=False)[1]
    (logits,) = run_distributed(mutated, directory, row_from_samples(samples), names)
    largest = float(expected.abs().max())
    found = {name: float((x - expected).abs().max()) / largest for name, x in zip(("none", *names), logits)}
    print({name: f"{value:.1e}" for name, value in found.items()})
    return found


def check(found):
    assert found.pop("none") <= LOGITS
    missed = {name: value for name, value in found.items() if value < TIMES * LOGITS}
    assert not missed, f"the bar of {LOGITS} would not show these {TIMES}-fold: {missed}"


def test_mistakes_show(tmp_path):
    hf = write_tiny_idefics2(tmp_path, sliding_window=11)
    check(differences(str(tmp_path), hf, MUTATIONS))


def test_wrong_eps_shows(tmp_path):
    hf = write_tiny_idefics2(tmp_path)
    small = (
        "embed_tokens.weight",
        "patch_embedding.weight",
        "patch_embedding.bias",
        "position_embedding.weight",
        "latents",
    )
    for name, parameter in hf.named_parameters():
        if name.endswith(small):
            parameter.data.mul_(SMALL)
    hf.save_pretrained(tmp_path)
    hf = Idefics2ForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")
    check(differences(str(tmp_path), hf, EPS_MUTATIONS))
