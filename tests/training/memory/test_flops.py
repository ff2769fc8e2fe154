import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.stream.counts import COUNT_DTYPE
from megatron_vlm.models.families.idefics2.config import Idefics2ModelConfig
from megatron_vlm.testing import shapes
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.twins.idefics2 import tiny_idefics2_config, tiny_tokenizer
from megatron_vlm.training.memory.flops import Flops, _causal_pairs, counted_flops, forward_flops

# Of the small shapes: one of two sizes, columns of tiles, a grid of them, none.
IMAGES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "idefics2": ((3, 84, 112), (3, 70, 42)),
    "internvl3": ((3, 3 * 112, 112), (3, 112, 112)),
    "llava_internlm2": ((3, 112, 112),),
    "xcomposer2": ((3, 112, 2 * 112),),
    "smolvlm": ((3, 112, 112),) * 3,
    "llava_next": ((3, 2 * 112, 112),),
    "internlm2": (),
    "gemma3": ((3, 112, 112),),
    "qwen2_5_vl": ((3, 84, 168), (3, 140, 56)),
    "qwen3_vl": ((3, 96, 192), (3, 160, 64)),
}


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
    counted = forward_flops(config, images=[(3, 40, 56)] * 2, segments=[40], supervised=40, causal_half=False)
    assert counter.get_total_flops() == counted.forward


def counted_by_torch(family: str) -> tuple[float, float]:
    """(operations of our formula, of torch's counter) of a forward pass of our own model, without data."""
    from megatron_vlm import registry
    from megatron_vlm.models.built import build_model
    from megatron_vlm.models.options import ModelOptions
    from megatron_vlm.parallel.config import ParallelConfig
    from megatron_vlm.parallel.rng import seed_step
    from megatron_vlm.parallel.topology import build_topology
    from megatron_vlm.training.memory.estimate import make_batch
    from megatron_vlm.training.memory.stages import RowShape
    from megatron_vlm.training.memory.trace import Meter

    config = shapes.small()[family]
    topology = build_topology(ParallelConfig(), num_layers=config.text.num_layers, device=torch.device("cpu"))
    seed_step(topology, 0, 0)
    row = RowShape(segments=(200,), images=IMAGES[family])
    with torch.device("meta"):
        options = ModelOptions(make_vocab_size_divisible_by=1)
        (chunk,) = build_model(registry.get(family), config, topology, options)
    chunk.requires_grad_(False)  # else the head's gradients are made, and counted, in the forward pass
    with sdpa_kernel(SDPBackend.MATH), Meter(), FlopCounterMode(display=False) as counter:
        chunk(make_batch(row, 200, config, torch.float32))
    ours = forward_flops(config, images=row.images, segments=row.segments, supervised=200, causal_half=False)
    return ours.forward, counter.get_total_flops()


@pytest.mark.parametrize("family", IMAGES)
def test_every_family_equals_torchs_count(family):
    ((ours, theirs),) = run_distributed(counted_by_torch, family)
    assert ours == theirs


def test_frozen_groups():
    flops = Flops(vision=1.0, connector=10.0, llm=100.0)
    assert flops.training() == 333
    assert flops.training({"vision"}) == 1 + 330
    assert flops.training({"vision", "llm"}) == 1 + 30 + 200
    assert flops.training({"llm"}) == 33 + 200
    assert flops.training({"vision", "connector", "llm"}) == 111
    everything = ("vision", "connector", "llm")
    assert flops.training(everything, {"llm"}) == 11 + 200  # weights beside adapters need no gradients
    assert flops.training(everything, {"vision"}) == 2 + 20 + 200


@pytest.mark.parametrize(
    "name",
    [
        "Idefics2-8B",
        "InternVL3-8B",
        "SmolVLM-2.2B",
        "LLaVA-InternLM2-7B",
        "Qwen2.5-VL-7B",
        "Qwen3-VL-8B",
        "Gemma3-4B",
    ],
)
def test_what_the_index_counts_gives_the_same(name):
    """Counts of a sample, without its images' sizes, against the images themselves."""
    _, config = shapes.published()[name]
    data = DataConfig(seq_length=16384)
    _, high, wide = config.expected_image(data)
    images = [(3, high, wide)] * 3
    costs = [config.image_cost(image) for image in images]
    counts = np.zeros(2, dtype=COUNT_DTYPE)
    counts["tokens"], counts["supervised"] = [9000, 700], [300, 9]
    counts["image_tokens"][0], counts["patches"][0] = sum(c.features for c in costs), sum(c.patches for c in costs)
    found = counted_flops(config, data, counts)
    exact = [forward_flops(config, images=images, segments=[9000], supervised=300)]
    exact.append(forward_flops(config, segments=[700], supervised=9))
    for part in vars(found):
        assert getattr(found, part).tolist() == pytest.approx([getattr(one, part) for one in exact]), part
    assert found.mean(2).llm == pytest.approx(sum(one.llm for one in exact) / 2)


def test_images_smaller_than_the_largest_are_no_parts_of_an_image():
    _, config = shapes.published()["Qwen3-VL-8B"]
    cost, counts = config.image_cost((3, 256, 256)), np.zeros(2, dtype=COUNT_DTYPE)
    counts["tokens"], counts["image_tokens"], counts["patches"] = (
        900,
        *([n, 2 * n] for n in (cost.features, cost.patches)),
    )
    found = counted_flops(config, DataConfig(seq_length=16384), counts).vision
    exact = [forward_flops(config, images=[(3, 256, 256)] * n, segments=[900], supervised=0).vision for n in (1, 2)]
    assert found[0] == pytest.approx(exact[0])
    assert exact[1] < found[1] < 1.1 * exact[1]  # two are taken for one of their size


@pytest.mark.parametrize("grid", [(1, 2, 336, 336), (2, 2, 480, 640)])
def test_views_are_counted_by_their_patches(grid):
    """LLaVA-NeXT's views have fewer features where an image leaves a part of them empty."""
    _, config = shapes.published()["LLaVA-NeXT-Mistral-7B"]
    views = 1 + grid[0] * grid[1]
    image = (3, views * 336, 336)
    cost, whole = config.image_cost(image, grid), config.image_cost(image)
    assert cost.features < whole.features
    counts = np.zeros(1, dtype=COUNT_DTYPE)
    counts["tokens"], counts["supervised"], counts["image_tokens"], counts["patches"] = (
        9000,
        300,
        cost.features,
        cost.patches,
    )
    found = counted_flops(config, DataConfig(seq_length=16384), counts)
    exact = forward_flops(config, images=[image], segments=[9000], supervised=300)
    for part in vars(found):
        assert float(getattr(found, part)[0]) == pytest.approx(getattr(exact, part)), part


@pytest.mark.parametrize(("length", "window", "pairs"), [(8, 8, 32), (8, 100, 32), (8, 2, 14), (0, 4, 0)])
def test_sliding_window(length, window, pairs):
    assert _causal_pairs(length, window) == pairs


def test_packing_counts_samples_apart():
    config = Idefics2ModelConfig.from_hf(tiny_idefics2_config(tiny_tokenizer()).to_dict())
    one = forward_flops(config, segments=[64], supervised=0)
    two = forward_flops(config, segments=[32, 32], supervised=0)
    assert two.llm < one.llm
