"""Idefics2 against Hugging Face: logits, loss and every gradient in fp32, eager attention, twins of std 0.15.

The measured worst case stands beside the bars.
"""

import copy

import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import hf_reference, layout_logits, random_samples
from megatron_vlm.testing.parity_check import Bars, check_parity
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2

BARS = Bars(logits=2e-5)  # measured: logits 4.3e-6 of the largest, 1.3 x noise, loss 2e-7, gradients 8e-6
# Towers without RoPE: adding a constant to every key changes no attention weight, so the true gradient is zero and what
# either side computes is round-off.
ZERO_GRADIENTS = ".self_attn.k_proj.bias"

# (height, width) of each image and text tokens: 0, 1 and 3 images, non-square, differently sized, one patch.
SAMPLES = [
    ([(40, 50)], 14),
    ([], 23),
    ([(56, 56), (17, 33), (24, 48)], 9),
    ([(8, 8)], 5),
]
# Trained on 60 positions: of the twin's four wavelengths one stays, one is blended and two are stretched.
LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 60,
}
TWINS = {
    "mistral": dict(text="mistral"),
    "mistral_window": dict(text="mistral", sliding_window=11),
    "llama": dict(text="llama"),
    "llama_tied": dict(text="llama", tie=True),
    "one_kv_head": dict(text="llama", kv_heads=1, perceiver_kv_heads=1),
    "llama_3.1": dict(text="llama", rope=LLAMA_3_1),
    "llama_3.2": dict(text="llama", rope={**LLAMA_3_1, "factor": 32.0}, tie=True),
}


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    """Name -> (directory, HF model, model config), made when first asked for."""
    made = {}

    def make(name):
        if name not in made:
            directory = str(tmp_path_factory.mktemp(name))
            hf = write_tiny_idefics2(directory, **TWINS[name])
            made[name] = directory, hf, registry.get("idefics2").config(hf.config.to_dict())
        return made[name]

    return make


@pytest.mark.parametrize("name", TWINS)
def test_forward_and_gradients_equal_hf(twins, name):
    directory, hf, config = twins(name)
    samples = random_samples(config, SAMPLES)
    theirs = hf_reference(hf, samples)
    exact = hf_reference(copy.deepcopy(hf).double(), samples, gradients=False)[1]
    grads, errors = check_parity(name, directory, samples, theirs, exact, BARS, lambda n: n.endswith(ZERO_GRADIENTS))
    zero = max(float(grads[n].norm()) for n in errors if n.endswith(ZERO_GRADIENTS) and "vision" in n)
    assert zero <= 1e-6 * float(torch.stack([g.norm() for g in theirs[2].values()]).norm())


def test_same_image_in_a_padded_batch_of_other_sizes(twins):
    """HF pads images to the largest of the batch; we never do: features must not depend on the neighbours."""
    directory, hf, config = twins("mistral")
    samples = random_samples(config, [([(24, 16), (56, 56)], 6), ([(24, 16)], 6)])
    samples[1] = type(samples[1])(**{**vars(samples[1]), "pixels": samples[0].pixels[:1]})
    (ours,) = run_distributed(layout_logits, directory, [row_from_samples([s]) for s in samples], {}, {})
    for sample, logits in zip(samples, ours["logits"]):
        expected = hf_reference(hf, [sample], gradients=False)[1]
        assert float((logits - expected).abs().max()) <= BARS.logits * float(expected.abs().max())
