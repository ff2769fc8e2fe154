"""The same model on a GPU, nothing patched: fp32 against HF, bf16 kernels, fp16 with dynamic loss scaling.

These run in the test process itself, over NCCL; the pool of CPU ranks lives in other processes.
"""

import copy

import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.testing.parity import hf_reference, random_samples
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2

pytestmark = pytest.mark.gpu
SAMPLES = [([(40, 50)], 14), ([], 23), ([(56, 56), (17, 33), (24, 48)], 9)]


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    directory = tmp_path_factory.mktemp("twin")
    # Heads of 16 and 24 dimensions: the varlen kernels want multiples of 8.
    hf = write_tiny_idefics2(directory, sliding_window=11, text_hidden=128, vision_hidden=96)
    return str(directory), hf, registry.get("idefics2").config(hf.config.to_dict())


def build(directory, dtype, **parallel):
    from megatron_vlm.conversion.load import load_into
    from megatron_vlm.conversion.open_source import open_source
    from megatron_vlm.models.built import build_model
    from megatron_vlm.models.options import ModelOptions
    from megatron_vlm.parallel.config import ParallelConfig
    from megatron_vlm.parallel.rng import seed_step
    from megatron_vlm.parallel.topology import build_topology, init_process_group

    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    init_process_group(device)
    source = open_source(directory)
    topology = build_topology(ParallelConfig(**parallel), num_layers=source.config.text.num_layers, device=device)
    seed_step(topology, 0, 0)
    options = ModelOptions(params_dtype=dtype, make_vocab_size_divisible_by=8)
    model = build_model(source.spec, source.config, topology, options).to(device)
    load_into(source, model)
    return model


def test_fp32_logits_equal_hf(twin):
    directory, hf, config = twin
    samples = random_samples(config, SAMPLES)
    expected = hf_reference(hf, samples, gradients=False)[1]
    (model,) = build(directory, "fp32")
    with torch.no_grad():
        logits = model.eval().logits(row_from_samples(samples).to("cuda")).cpu()
    assert float((logits - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


def test_bf16_kernels_are_close(twin):
    directory, hf, config = twin
    samples = random_samples(config, SAMPLES)
    expected = hf_reference(hf, samples, gradients=False)[1]
    (model,) = build(directory, "bf16")
    with torch.no_grad():
        logits = model.eval().logits(row_from_samples(samples).to("cuda")).float().cpu()
    # Rounding alone: HF itself in bf16 on the CPU gives the scale of it.
    rounded = hf_reference(copy.deepcopy(hf).to(torch.bfloat16), samples, gradients=False)[1].float()
    noise = float((rounded - expected).norm())
    assert float((logits - expected).norm()) <= 2 * noise


def test_fp16_skips_an_overflowed_step_and_lowers_the_scale(twin):
    from megatron_vlm.parallel.config import ParallelConfig
    from megatron_vlm.training.optimizer.build import build_optimizer, set_learning_rates, wrap_model
    from megatron_vlm.training.optimizer.config import OptimizerConfig
    from megatron_vlm.training.step import train_step

    directory, _, config = twin
    model = wrap_model(build(directory, "fp16"), ParallelConfig())
    optimizer = build_optimizer(OptimizerConfig(hysteresis=1), model)
    rows = [row_from_samples(random_samples(config, SAMPLES))]
    before = {name: p.detach().clone() for name, p in model.stages[0].module.named_parameters()}
    results = []
    for _ in range(40):
        set_learning_rates(optimizer, dict.fromkeys(("llm", "vision", "connector"), 1e-3), 0.0)
        results.append(train_step(model, optimizer, rows))
        if results[-1].skipped:
            assert all(torch.equal(p, before[name]) for name, p in model.stages[0].module.named_parameters())
            continue
        break
    assert results[0].skipped and not results[-1].skipped
    assert results[-1].loss_scale < results[0].loss_scale
    assert any(not torch.equal(p, before[name]) for name, p in model.stages[0].module.named_parameters())
