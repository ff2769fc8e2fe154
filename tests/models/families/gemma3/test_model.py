"""Gemma 3 against transformers: logits, loss and every gradient in fp32, eager attention; and that the bar shows mistakes."""

import copy
import dataclasses

import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.layers import norm
from megatron_vlm.layers.context import blocks
from megatron_vlm.models.families.gemma3.mapping import NAMES
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.mutations import assert_noticed, mutated_logits
from megatron_vlm.testing.parity import hf_reference, layout_logits
from megatron_vlm.testing.parity_check import Bars, check_parity
from megatron_vlm.testing.twins.gemma3 import hf_inputs, make_samples, write_tiny_gemma3

BARS = Bars()  # measured: logits 4.7e-7 of the largest, 1.0 x noise, loss 1e-8, gradients 1.5e-6
TIMES = 30
SAMPLES = [(2, 14), (0, 23), (1, 9), (3, 5)]  # images of 9 tokens under a window of 7, and text tokens
TWINS = {
    "": {},
    # Odd heads, an image of 4 tokens that the window cuts, no scale of queries, unscaled RoPE, an untied head.
    "odd": dict(
        text=dict(
            sliding_window=5,
            query_pre_attn_scalar=12,
            layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            rope_parameters=None,
            hidden_size=72,
        ),
        vision=dict(num_attention_heads=3),
        tokens=4,
        tie=False,
    ),
}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Name -> (directory, HF model, samples)."""
    made = {}

    def make(name):
        if name not in made:
            directory = str(tmp_path_factory.mktemp("twin"))
            hf = write_tiny_gemma3(directory, **TWINS[name])
            config = registry.get("gemma3").config(hf.config.to_dict())
            made[name] = directory, hf, make_samples(config, SAMPLES)
        return made[name]

    return make


def no_true_gradient(name):
    """A constant added to every key changes no attention weight where there is no RoPE."""
    return "vision_model" in name and name.endswith("k_proj.bias")


@pytest.mark.parametrize("name", TWINS)
def test_forward_and_gradients_equal_hf(twins, name):
    directory, hf, samples = twins(name)
    loss, logits, grads = hf_reference(hf, samples, inputs=hf_inputs)
    exact = hf_reference(copy.deepcopy(hf).double(), samples, gradients=False, inputs=hf_inputs)[1]
    theirs = loss, logits, {NAMES.file_name(n): g for n, g in grads.items()}
    check_parity(name, directory, samples, theirs, exact, BARS, no_true_gradient)


@pytest.mark.full  # kernels are compiled for a minute
def test_the_fused_backend_gives_the_same(twins):
    directory, _, samples = twins("")
    row = row_from_samples(samples)
    (plain,), (fused,) = (
        run_distributed(layout_logits, directory, [row], {}, {"transformer_impl": impl}) for impl in ("local", "fused")
    )
    assert torch.allclose(plain["logits"][0], fused["logits"][0], atol=1e-5 * float(plain["logits"][0].abs().max()))


def cores(model):
    return [layer.self_attention.core_attention for layer in model.language_model.decoder.layers]


def keep_rope(model):
    """Each layer keeps its RoPE, whatever window it is given."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    class Local(TransformerLayer):
        def forward(self, *args, packed_seq_params, rotary_pos_emb, **kwargs):
            row = packed_seq_params.local
            return super().forward(*args, packed_seq_params=row, rotary_pos_emb=row.angles, **kwargs)

    for layer in model.language_model.decoder.layers:
        layer.__class__ = TransformerLayer if layer.self_attention.core_attention.window is None else Local


def mutate(name, model, batch, patch):
    """Makes one mistake; returns the batch to run."""
    decoder = model.language_model
    if name == "causal inside images":
        decoder.image_blocks = False
    elif name == "causal inside images of layers with a window":
        true = blocks.BlockCall.replace
        patch(
            blocks.BlockCall,
            "replace",
            lambda self, output, q, k, v, window: output if window else true(self, output, q, k, v, window),
        )
    elif name == "images of a sample see each other":
        (first, _), (_, last), *rest = batch.runs
        return dataclasses.replace(batch, runs=((first, last), *rest))
    elif name == "no window inside images":
        true = blocks.BlockCall.replace
        patch(blocks.BlockCall, "replace", lambda self, output, q, k, v, window: true(self, output, q, k, v, None))
    elif name in ("window on global layers", "no window"):
        keep_rope(model)
        for core in cores(model):
            core.window = 7 if name == "window on global layers" else None
    elif name == "window one too wide":
        for core in cores(model):
            core.window = core.window and core.window + 1
    elif name == "global RoPE in layers with a window":
        decoder.local_rotary_angles = decoder.rotary_angles
    elif name == "local RoPE everywhere":
        decoder.rotary_angles = decoder.local_rotary_angles
    elif name == "RoPE of global layers unscaled":
        decoder.rotary_angles.inv_freq = decoder.rotary_angles.inv_freq * 4
    elif name == "norms without the 1":
        for module in model.modules():
            if getattr(module, "zero_centered", False):
                module.weight.data.sub_(1.0)
    elif name == "norm of the connector without the 1":
        model.connector.norm.weight.data.sub_(1.0)
    elif name == "embeddings unscaled":
        decoder.embedding_scale = 1.0
    elif name == "features scaled":
        model.connector.projection.data.mul_(decoder.embedding_scale)
    elif name == "scaled by the size of a head":
        for core in cores(model):
            core.query_scale = None
    elif name == "no norms after attention and MLP":
        patch(norm.NormedResidual, "forward", lambda *_: lambda update, residual, dropout: residual + update[0])
    elif name == "norms after attention and before the MLP exchanged":
        for layer in decoder.decoder.layers:
            a, b = layer.self_attn_bda.weight, layer.pre_mlp_layernorm.weight
            a.data, b.data = b.data, a.data
    elif name == "blocks of patches column by column":
        model.connector.forward = lambda patches, counts: type(model.connector).forward(
            model.connector, patches.view(len(counts), 6, 6, -1).transpose(1, 2).reshape(patches.shape), counts
        )
    return batch


MUTATIONS = [
    "causal inside images",
    "causal inside images of layers with a window",
    "images of a sample see each other",
    "no window inside images",
    "window on global layers",
    "no window",
    "window one too wide",
    "global RoPE in layers with a window",
    "local RoPE everywhere",
    "RoPE of global layers unscaled",
    "norms without the 1",
    "norm of the connector without the 1",
    "embeddings unscaled",
    "features scaled",
    "scaled by the size of a head",
    "no norms after attention and MLP",
    "norms after attention and before the MLP exchanged",
    "blocks of patches column by column",
]


def mutated(directory, row, names):
    return mutated_logits(mutate, directory, row, names)


def test_mistakes_show(twins):
    directory, hf, samples = twins("")
    expected = hf_reference(hf, samples, gradients=False, inputs=hf_inputs)[1]
    (logits,) = run_distributed(mutated, directory, row_from_samples(samples), MUTATIONS)
    assert_noticed(logits, expected, MUTATIONS, bar=BARS.logits, times=TIMES)
