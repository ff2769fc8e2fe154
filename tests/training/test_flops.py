import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_vlm.models.idefics2.config import Idefics2ModelConfig
from megatron_vlm.testing.twins import tiny_idefics2_config, tiny_tokenizer
from megatron_vlm.training.flops import Flops, _causal_pairs, forward_flops


def test_equal_to_torchs_count():
    """The formula gives what FlopCounterMode counts of HF's forward pass, to the operation."""
    from transformers import Idefics2ForConditionalGeneration

    tokenizer = tiny_tokenizer()
    hf_config = tiny_idefics2_config(tokenizer)
    hf_config._attn_implementation = "sdpa"
    model = Idefics2ForConditionalGeneration(hf_config).eval().requires_grad_(False)
    latents, image = hf_config.perceiver_config.resampler_n_latents, hf_config.image_token_id
    ids = torch.full((1, 40), 5)
    ids[0, 3 : 3 + 2 * latents] = image
    pixels = torch.randn(1, 2, 3, 40, 56)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=pixels)
    config = Idefics2ModelConfig.from_hf(hf_config.to_dict())
    counted = forward_flops(config, patches=[35, 35], segments=[40], supervised=40, causal_half=False)
    assert counter.get_total_flops() == counted.forward


def test_frozen_groups():
    flops = Flops(vision=1.0, connector=10.0, llm=100.0)
    assert flops.training() == 333
    assert flops.training({"vision"}) == 1 + 330
    assert flops.training({"vision", "llm"}) == 1 + 30 + 200
    assert flops.training({"llm"}) == 33 + 200
    assert flops.training({"vision", "connector", "llm"}) == 111


@pytest.mark.parametrize(("length", "window", "pairs"), [(8, 8, 32), (8, 100, 32), (8, 2, 14), (0, 4, 0)])
def test_sliding_window(length, window, pairs):
    assert _causal_pairs(length, window) == pairs


def test_packing_counts_samples_apart():
    config = Idefics2ModelConfig.from_hf(tiny_idefics2_config(tiny_tokenizer()).to_dict())
    one = forward_flops(config, patches=[], segments=[64], supervised=0)
    two = forward_flops(config, patches=[], segments=[32, 32], supervised=0)
    assert two.llm < one.llm
