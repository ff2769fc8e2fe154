"""InternLM2 against LlamaForCausalLM on unfused weights: logits, loss, every gradient; and that the bar shows mistakes.

The reference's weights were fused by the twin, by the published layout; the package's own mapping has no part in it.
"""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.layers.norm import RMSNorm
from megatron_vlm.layers.rope import RotaryAngles
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.mutations import assert_noticed, mutated_logits
from megatron_vlm.testing.parity import hf_reference
from megatron_vlm.testing.parity_check import Bars, check_parity
from megatron_vlm.testing.twins.internlm2 import fuse, llama_inputs, make_samples, write_tiny_internlm2

BARS = Bars()  # measured: logits 1.5e-6 of the largest, 0.94 x noise, loss 2e-7, gradients 2e-6
TIMES = 30
POSITIONS = 64
LENGTHS = [17, 64, 90, 1, 150]  # two of them beyond the trained positions
TWINS = {
    "chat": {},
    "tied": dict(tie_word_embeddings=True, rope_scaling=None),
    "factor_1": dict(rope_scaling={"type": "dynamic", "factor": 1.0}, num_key_value_heads=8),
}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Name -> (directory, Llama twin, model config, samples)."""
    made = {}

    def make(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            llama = write_tiny_internlm2(directory, max_position_embeddings=POSITIONS, **TWINS[name])
            config = registry.get("internlm2").config(json.loads(Path(directory, "config.json").read_text()))
            lengths = LENGTHS if config.text.rope_scaling else [17, 64, 5]
            made[name] = str(directory), llama, config, make_samples(config.text.vocab_size, lengths)
        return made[name]

    return make


@pytest.mark.parametrize("name", TWINS)
def test_forward_and_gradients_equal_llama(twins, name):
    """One at a time too: no attention across samples, each its own RoPE base."""
    directory, llama, config, samples = twins(name)
    loss, _, grads = hf_reference(llama, [s for s in samples if len(s.labels) > 1], inputs=llama_inputs)
    logits = hf_reference(llama, samples, gradients=False, inputs=llama_inputs)[1]
    exact = hf_reference(copy.deepcopy(llama).double(), samples, gradients=False, inputs=llama_inputs)[1]
    theirs = loss, logits, fuse(grads, config.text.num_query_groups)
    check_parity(name, directory, samples, theirs, exact, BARS)


def plain_thirds(model):
    """The rows of ``wqkv`` read as [all q, all k, all v]."""
    groups = model.config.num_query_groups
    for layer in model.language_model.decoder.layers:
        weight = layer.self_attention.linear_qkv.weight.data
        q, k, v = weight.split([len(weight) - 2 * 8 * groups, 8 * groups, 8 * groups])
        weight.copy_(torch.cat([part.unflatten(0, (groups, -1)) for part in (q, k, v)], 1).flatten(0, 1))


def one_length(self, position_ids, cu_q, cu_k, max_k, segments=None):
    """Dynamic NTK by the longest sample of the row, for all."""
    whole = torch.tensor([0, max_k], dtype=cu_k.dtype)
    freqs = position_ids.float()[:, None] * self._dynamic(whole)
    return torch.cat((freqs, freqs), -1)[:, None, None]


def mutate(name, model, batch, patch):
    """Makes one mistake; returns the batch to run."""
    if name == "wqkv in thirds":
        plain_thirds(model)
    elif name == "no dynamic NTK":
        patch(model.language_model.rotary_angles, "scaling", None)
    elif name == "dynamic NTK by the longest sample":
        patch(RotaryAngles, "__call__", one_length)
    elif name == "rope base":
        patch(model.language_model.rotary_angles, "base", 1e5)
    elif name == "rope restarts inside a sample":
        positions = batch.position_ids.clone()
        positions[30:81] -= positions[30].clone()
        return dataclasses.replace(batch, tokens={**batch.tokens, "position_ids": positions})
    elif name == "attention across samples":
        total = batch.starts[-1]
        return dataclasses.replace(batch, cu_seqlens=torch.tensor([0, total], dtype=torch.int32), starts=(0, total))
    elif name == "w1 and w3 exchanged":
        for layer in model.language_model.decoder.layers:
            weight = layer.mlp.linear_fc1.weight.data
            weight.copy_(weight.roll(len(weight) // 2, 0))
    elif name == "eps x 10":
        for part in model.modules():
            if isinstance(part, RMSNorm):
                part.eps *= 10
    return batch


MUTATIONS = [
    "wqkv in thirds",
    "no dynamic NTK",
    "dynamic NTK by the longest sample",
    "rope base",
    "rope restarts inside a sample",
    "attention across samples",
    "w1 and w3 exchanged",
]


def mutated(directory, row, names):
    return mutated_logits(mutate, directory, row, names)


def check(directory, llama, samples, names):
    expected = hf_reference(llama, samples, gradients=False, inputs=llama_inputs)[1]
    (logits,) = run_distributed(mutated, directory, row_from_samples(samples), names)
    assert_noticed(logits, expected, names, bar=BARS.logits, times=TIMES)


def test_mistakes_show(twins):
    directory, llama, _, samples = twins("chat")
    check(directory, llama, samples, MUTATIONS)


def test_wrong_eps_shows(tmp_path):
    """On a twin whose residual stream starts small: at unit scale nobody can see an epsilon."""
    from safetensors.torch import load_file, save_file

    llama = write_tiny_internlm2(tmp_path)
    llama.model.embed_tokens.weight.data.mul_(0.02)
    state = load_file(tmp_path / "model.safetensors")
    state["model.tok_embeddings.weight"] *= 0.02
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    check(str(tmp_path), llama, make_samples(llama.config.vocab_size, [17, 40]), ["eps x 10"])
