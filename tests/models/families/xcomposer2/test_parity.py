"""InternLM-XComposer2 against its plain-torch reference: logits, loss and every gradient in fp32, twins of std 0.15.

The reference is anchored first: without image tokens it is LlamaForCausalLM, with nothing but image tokens it is
LlamaForCausalLM whose matrices have the branches merged in.
"""

import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.testing.parity_check import Bars, check_parity
from megatron_vlm.testing.twins.xcomposer2 import make_samples, write_tiny_xcomposer2
from megatron_vlm.testing.twins.xcomposer2_reference import LINEARS, Reference

BARS = Bars()  # measured: logits 2e-6 of the largest, 1.1 x noise, loss 1e-6, gradients 4e-6
ANCHOR = 1e-5  # of the largest logit
ZERO_GRADIENTS = ".self_attn.k_proj.bias"  # of the tower: a constant added to every key changes no attention weight

ONE = (1, 1)
# Grids of each image and text tokens: 0, 1 and 3 images, mixed grids in the 4khd variant.
SAMPLES = {
    "7b": [([ONE], 14), ([], 23), ([ONE, ONE, ONE], 9), ([ONE], 5)],
    "4khd-7b": [([(1, 2)], 14), ([], 23), ([ONE, (3, 1), (2, 2)], 9), ([ONE], 5)],
}
TWINS = {
    "7b": dict(variant="7b"),
    "vl-7b": dict(variant="7b", img_size=42),
    "4khd-7b": dict(variant="4khd-7b"),
}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Name -> (directory, config.json, samples), made when first asked for."""
    made = {}

    def make(name):
        if name not in made:
            directory = str(tmp_path_factory.mktemp(name))
            config = write_tiny_xcomposer2(directory, **TWINS[name])
            made[name] = directory, config, make_samples(config, SAMPLES[TWINS[name]["variant"]])
        return made[name]

    return make


def test_the_reference_without_images_is_llama(twins):
    directory, _, samples = twins("7b")
    reference = Reference(directory)
    with torch.no_grad():
        ours = reference.logits(samples[1])
        embedded = reference.weights["model.tok_embeddings.weight"][samples[1].input_ids]
        reference.llama.load_state_dict(reference.llama_weights())
        reference.mask = None  # no hook acts
        llama = reference.llama(inputs_embeds=embedded[None]).logits[0]
    assert float((ours - llama).abs().max()) <= ANCHOR * float(llama.abs().max())


def test_the_reference_on_images_alone_is_llama_with_the_branches_merged(twins):
    directory, config, _ = twins("7b")
    reference = Reference(directory)
    x = torch.randn(17, config["hidden_size"], generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours = reference.decode(x, torch.ones(17, dtype=torch.bool))
        for i in range(config["num_hidden_layers"]):
            for linear in LINEARS:
                name = f"model.layers.{i}.{linear}"
                branch = reference.weights[f"{name}.Plora_B.weight"] @ reference.weights[f"{name}.Plora_A.weight"]
                reference.weights[f"{name}.weight"] = reference.weights[f"{name}.weight"] + branch
        merged = reference.decode(x, None)
        assert float((ours - merged).abs().max()) <= ANCHOR * float(merged.abs().max())
        plain = Reference(directory).decode(x, None)
        assert float((ours - plain).abs().max()) > 0.1 * float(merged.abs().max())  # the branches do act


@pytest.mark.parametrize("name", TWINS)
def test_forward_and_gradients_equal_the_reference(twins, name):
    directory, hf_config, samples = twins(name)
    config = registry.get("xcomposer2").config(hf_config)
    assert config.variant == {"7b": "vl-7b"}.get(name, name)  # the published 7b has 16 patches a side
    theirs = Reference(directory).run(samples)
    exact = Reference(directory, torch.float64).run(samples, gradients=False)[1]
    _, errors = check_parity(name, directory, samples, theirs, exact, BARS, lambda n: n.endswith(ZERO_GRADIENTS))
    branches = max((e, n) for n, e in errors.items() if "Plora" in n)
    print(f"{name}: worst gradient of a branch {branches[0]:.2e} {branches[1]}")
