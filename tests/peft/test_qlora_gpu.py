"""NF4 and QLoRA on a GPU: bitsandbytes' kernels against the oracle, what lies in the GPU's memory, a step against PEFT.

These run in the test process itself; no pool of ranks and no files but a twin's are needed.
"""

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F

from megatron_vlm.conversion.load import load_model
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.rng import seed_step
from megatron_vlm.parallel.topology import build_topology, init_process_group
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.peft.lora import apply_lora, fill
from megatron_vlm.peft.qlora import quantization_of
from megatron_vlm.peft.select import make_plan
from megatron_vlm.testing import nf4_oracle
from megatron_vlm.testing.nf4_oracle import dequantise
from megatron_vlm.testing.parity import hf_inputs, random_samples
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.testing.twins.peft import our_name, peft_twin, twin_in_4bit
from megatron_vlm.weights.mapping import ROW, direct, gated, qkv
from megatron_vlm.weights.nf4.shard import Lines, shard
from megatron_vlm.weights.nf4.tensor import block_values, quantise

pytestmark = pytest.mark.gpu
SHAPES = [(64, 64), (24, 4304), (1152, 4304), (300, 130), (2048, 4096)]
SAMPLES = [([(40, 50)], 14), ([], 23), ([(56, 56), (17, 33)], 9)]
TARGETS = dict(target_modules=r".*text_model.*_proj", r=4, alpha=8)
LOGITS = 2e-5  # of the largest logit, fp32
GRADIENT = 1e-4  # of the norm of all gradients, fp32


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("idefics2"))
    # Heads of 16 and 24 dimensions: the varlen kernels want multiples of 8.
    write_tiny_idefics2(directory, text_hidden=128, ffn=192, layers=2, vision_hidden=96, dtype=torch.bfloat16)
    return directory


def draw(*shape: int) -> torch.Tensor:
    return (0.15 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))).bfloat16().cuda()


def test_the_oracle_agrees_on_cuda():
    """Codes, scales and values; the plain ones are the CPU's as well, the 8-bit ones are of the device."""
    for shape in SHAPES:
        weight = draw(*shape)
        for double in (False, True):
            codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
            ours, plain = quantise(weight, double=double), nf4_oracle.quantise(weight, double=double)
            assert torch.equal(ours.codes, codes.view(-1)) and torch.equal(ours.absmax, state.absmax), shape
            different = {name: int((plain.parts()[name] != part).sum()) for name, part in ours.parts().items()}
            print(f"{shape} double {double}: different values {different}")
            assert not any(different.values()), (shape, double, different)
            expected = bnb.dequantize_4bit(codes, state).view(shape)
            for by in (block_values, nf4_oracle.block_values):
                assert torch.equal(dequantise(ours, torch.bfloat16, by), expected), (shape, double)
            if not double:
                cpu = quantise(weight.cpu(), double=False)
                assert torch.equal(cpu.codes, ours.codes.cpu()) and torch.equal(cpu.absmax, ours.absmax.cpu()), shape


def test_shards_equal_the_whole_tensor_on_cuda():
    heads = dict(num_heads=8, num_query_groups=4)
    for entry, shapes in (
        (direct("w", "w", ROW), [(256, 1024)]),
        (direct("w", "w", ROW), [(48, 4304)]),
        (gated("w", ["gate", "up"]), [(320, 256)] * 2),
        (qkv("w", "qkv", **heads), [(128, 128), (64, 128), (64, 128)]),
    ):
        tensors = [quantise(draw(*shape), double=True) for shape in shapes]
        full = entry.to_full([dequantise(tensor, torch.bfloat16, block_values) for tensor in tensors])
        for tp in (1, 2, 4):
            for rank in range(tp):
                codes, nf4 = shard(Lines.of(entry, shapes, tp, rank), tensors, torch.bfloat16)
                assert codes.is_cuda and torch.equal(nf4.values(codes), entry.split.shard(full, tp, rank))


def build(directory: str, dtype: str, tensors: dict[str, torch.Tensor], **settings):
    """(model, source) with pairs over a base in 4 bits."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    init_process_group(device)
    with open_source(directory) as source:
        topology = build_topology(ParallelConfig(), num_layers=source.config.text.num_layers, device=device)
        seed_step(topology, 0, 0)
        peft = PeftConfig(**settings)
        plan = make_plan(source.spec, source.config, peft, source.infos)
        options = ModelOptions(params_dtype=dtype, make_vocab_size_divisible_by=8)
        model = load_model(source, topology, options, quantization_of(peft, dtype), plan.saved)
        model = apply_lora(model, plan, seed=0)
        entries = [entry for entry in model.mapping if entry.hf[0] in tensors]
        full = {entry.name: entry.to_full([tensors[hf] for hf in entry.hf]) for entry in entries}
        fill(model, full)
    return model, {entry.name: entry.hf[0] for entry in entries}, source


def test_full_weights_never_lie_on_the_gpu(tmp_path):
    """While a base is quantised on load, the GPU holds its codes and the tensor at hand."""
    write_tiny_idefics2(tmp_path, text_hidden=1024, ffn=3072, layers=6, heads=8, kv_heads=8, dtype=torch.bfloat16)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (stage,), _, source = build(str(tmp_path), "bf16", {}, quantize="nf4", **TARGETS)
    after, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    linears = sum(info.nbytes for name, info in source.infos.items() if ".layers." in name and "language" in name)
    largest = max(info.nbytes for info in source.infos.values())
    print(f"linears in bf16 {linears / 2**20:.0f} MiB; held {after / 2**20:.0f}, at the peak {peak / 2**20:.0f}")
    assert peak - after < 2 * largest < linears / 4  # measured on an H100: 11 MiB, largest 16, linears 156
    held = sum(t.numel() * t.element_size() for t in (*stage.parameters(), *stage.buffers()))
    assert after < held + linears / 10


def test_fp32_equals_peft_on_bitsandbytes(twin):
    """Logits and gradients of the pairs, both sides on the GPU."""
    model, tensors = peft_twin(twin_in_4bit(twin, torch.float32, device="cuda"), TARGETS)
    with open_source(twin) as source:
        samples = random_samples(source.config, SAMPLES)
    loss, expected = torch.zeros((), device="cuda"), []
    for sample in samples:
        inputs = {name: tensor.cuda() for name, tensor in hf_inputs(sample).items()}
        logits = model(**inputs).logits[0]
        loss = loss + F.cross_entropy(logits[:-1], sample.labels[1:].cuda(), reduction="sum")
        expected.append(logits.detach())
    loss.backward()
    theirs = {our_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad}
    (stage,), hf_names, _ = build(twin, "fp32", tensors, quantize="nf4", **TARGETS)
    batch = row_from_samples(samples).to("cuda")
    with torch.no_grad():
        logits = stage.eval().logits(batch)
    whole = torch.cat(expected)
    difference = float((logits - whole).abs().max() / whole.abs().max())
    stage.train()
    our_loss = stage(batch)
    our_loss.backward()
    ours = {hf_names[name]: p.grad for name, p in stage.named_parameters() if p.requires_grad}
    assert set(ours) == set(theirs)
    off, norm = (torch.stack([g.norm() for g in grads]).norm() for grads in
                 ([ours[name] - theirs[name] for name in ours], theirs.values()))  # fmt: skip
    print(
        f"logits {difference:.1e}, loss {abs(float(our_loss - loss)) / float(loss):.1e}, gradients {float(off / norm):.1e}"
    )
    assert difference <= LOGITS and float(off / norm) <= GRADIENT
    assert abs(float(our_loss - loss)) <= 2e-6 * float(loss)


def test_a_bf16_run_learns(twin):
    """Ten updates of the pairs alone; the codes stay what they were."""
    from megatron_vlm.training.optimizer.build import build_optimizer, set_learning_rates, wrap_model
    from megatron_vlm.training.optimizer.config import OptimizerConfig
    from megatron_vlm.training.step import train_step

    settings = dict(quantize="nf4", quantize_groups=("llm", "vision"), **TARGETS)
    model, _, source = build(twin, "bf16", {}, **settings)
    (stage,) = model
    codes = {name: buffer.clone() for name, buffer in stage.named_buffers() if buffer.dtype == torch.uint8}
    model = wrap_model(model, ParallelConfig())
    config = OptimizerConfig(lr=1e-2)
    optimizer = build_optimizer(config, model)
    set_learning_rates(optimizer, dict.fromkeys(("llm", "vision", "connector"), 1e-2), config.weight_decay)
    rows = [row_from_samples(random_samples(source.config, SAMPLES))]
    losses = [train_step(model, optimizer, rows).loss for _ in range(10)]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(buffer, codes[name]) for name, buffer in stage.named_buffers() if name in codes)
