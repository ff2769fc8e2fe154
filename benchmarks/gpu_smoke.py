"""Checks and measures one GPU: attention kernels against the exact one, and the training step of an Idefics2 of about 1B.

    python benchmarks/gpu_smoke.py [--steps 20] [--row 4096] [--recompute]
    python benchmarks/gpu_smoke.py --device cpu --tiny        the same code in a minute without a GPU; its speeds mean nothing

Tokens are real ones (random text, no padding); MFU is model FLOPs (training/memory/flops.py: tower included, recomputation not)
over the peak of the device, and over a matrix product measured in the same run.
"""

import argparse
import os
import statistics
import time

import torch

from megatron_vlm import registry
from megatron_vlm.data.row import IGNORE_INDEX, EncodedSample, Row, row_from_samples
from megatron_vlm.layers.attention import attention, select_backend
from megatron_vlm.models.built import build_model
from megatron_vlm.models.families.idefics2.config import Idefics2ModelConfig
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.parts.decoder import TextConfig
from megatron_vlm.models.parts.perceiver import PerceiverConfig
from megatron_vlm.models.parts.siglip import SiglipConfig
from megatron_vlm.parallel import cpu
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.rng import seed_step
from megatron_vlm.parallel.topology import build_topology, init_process_group
from megatron_vlm.training.memory.flops import forward_flops
from megatron_vlm.training.optimizer.build import build_optimizer, set_learning_rates, wrap_model
from megatron_vlm.training.optimizer.config import OptimizerConfig
from megatron_vlm.training.step import train_step

# Dense bf16 peak in TFLOP/s by a part of the device's name (vendor's data sheets, SXM where both exist).
PEAKS = {"H100": 989.4, "H200": 989.4, "H800": 989.4, "A100": 312.0, "A800": 312.0, "B200": 2250.0, "L40S": 362.0}
IMAGE = 378  # pixels a side: 27 x 27 patches
# name: query heads, key heads, head size, query lengths, key lengths, causal, window
CASES = {
    "tower, 16 heads of 72": (16, 16, 72, (729, 300, 729), (729, 300, 729), False, None),
    "perceiver, 16/4 heads of 96": (16, 4, 96, (64, 64, 64), (793, 364, 793), False, None),
    "decoder, 32/8 heads of 128": (32, 8, 128, (1500, 700, 1), (1500, 700, 1), True, None),
    "decoder, window 512": (32, 8, 128, (1500, 700, 1), (1500, 700, 1), True, 512),
}


def model_config(tiny: bool) -> Idefics2ModelConfig:
    """The shape that is measured: about 1.1B parameters, or a toy with every part of it."""
    hidden, layers, heads, vision_layers = (64, 2, 4, 2) if tiny else (2048, 16, 16, 12)
    return Idefics2ModelConfig(
        text=TextConfig(
            model_type="mistral", hidden_size=hidden, ffn_hidden_size=hidden * 11 // 4, num_layers=layers,
            num_attention_heads=heads, num_query_groups=heads // 2, head_dim=hidden // heads,
            vocab_size=512 if tiny else 32003, max_position_embeddings=32768, norm_epsilon=1e-5, rotary_base=10000.0,
            sliding_window=None, tie_word_embeddings=False,
        ),
        vision=SiglipConfig(
            hidden_size=48 if tiny else 768, ffn_hidden_size=96 if tiny else 3072, num_layers=vision_layers,
            num_attention_heads=4 if tiny else 12, image_size=980, patch_size=14, num_channels=3, norm_epsilon=1e-6,
        ),
        perceiver=PerceiverConfig(
            num_latents=64, depth=1 if tiny else 3, num_attention_heads=heads, num_query_groups=heads // 4,
            head_dim=16 if tiny else 96, norm_epsilon=1e-6,
        ),
        image_token_id=5,
    )  # fmt: skip


def attention_errors(device: torch.device, shrink: int) -> None:
    """Prints, per case and kernel, the relative error of output and gradients against exact attention in fp32.

    Segments are ``shrink`` times shorter than CASES says.
    """
    on_gpu = device.type == "cuda"
    kernels = ["segments", "torch_varlen"] if on_gpu else ["segments"]
    try:
        import flash_attn  # noqa: F401

        kernels += ["flash_attn"] * on_gpu
    except ImportError:
        print("flash-attn is not installed: its kernel is not compared")
    print("\n| case | kernel | output | dq | dk | dv |\n| --- | --- | --- | --- | --- | --- |")
    for case, (heads, groups, dim, lengths_q, lengths_k, causal, window) in CASES.items():
        generator = torch.Generator().manual_seed(0)
        lengths_q, lengths_k = (tuple(-(-n // shrink) for n in lengths) for lengths in (lengths_q, lengths_k))
        window = window and window // shrink
        total_q, total_k = sum(lengths_q), sum(lengths_k)
        shapes = ((total_q, heads, dim), (total_k, groups, dim), (total_k, groups, dim), (total_q, heads, dim))
        tensors = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
        cu_q, cu_k = (
            torch.tensor([0, *x], dtype=torch.int32).cumsum(0, dtype=torch.int32) for x in (lengths_q, lengths_k)
        )
        exact: list[torch.Tensor] = []
        for kernel, dtype in [("segments", torch.float32), *((kernel, torch.bfloat16) for kernel in kernels)]:
            os.environ["MEGATRON_VLM_ATTENTION"] = kernel
            select_backend.cache_clear()
            q, k, v, grad = (t.to(device, dtype) for t in tensors)
            inputs = [t.requires_grad_() for t in (q, k, v)]
            limits = (max(lengths_q), max(lengths_k))
            out = attention(*inputs, cu_q.to(device), cu_k.to(device), *limits, causal=causal, window=window)
            found = [t.detach().float() for t in (out, *torch.autograd.grad(out, inputs, grad))]
            if not exact:
                exact = found
                continue
            errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact)]
            print(f"| {case} | {kernel} | " + " | ".join(f"{error:.1e}" for error in errors) + " |")
    del os.environ["MEGATRON_VLM_ATTENTION"]
    select_backend.cache_clear()


def make_row(config: Idefics2ModelConfig, tokens: int, image: int, seed: int) -> Row:
    """A full row of four samples, each with one image and random text."""
    generator = torch.Generator().manual_seed(seed)
    latents, samples = config.perceiver.num_latents, []
    for index in range(4):
        ids = torch.randint(6, config.text.vocab_size, (tokens // 4,), generator=generator)
        positions = torch.arange(2, 2 + latents)
        ids[positions] = config.image_token_id
        labels = ids.clone()
        labels[: 2 + latents] = IGNORE_INDEX
        pixels = (torch.randn(3, image, image, generator=generator),)
        sample = EncodedSample(key=str(index), input_ids=ids, labels=labels, pixels=pixels, image_positions=positions)
        samples.append(sample)
    return row_from_samples(samples)


def measured_matmul(device: torch.device, size: int) -> float:
    """TFLOP/s of a bf16 matrix product of ``size`` cubed."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(12):
        start = clock(device)
        a @ b
        seconds.append(clock(device) - start)
    return 2 * size**3 / statistics.median(seconds[2:]) / 1e12


def clock(device: torch.device) -> float:
    """Seconds, after everything that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def training_speed(args: argparse.Namespace, device: torch.device) -> None:
    """Trains on random rows and prints the speeds."""
    config, parallel = model_config(args.tiny), ParallelConfig()
    topology = build_topology(parallel, num_layers=config.text.num_layers, device=device)
    seed_step(topology, 0, 0)
    options = ModelOptions(params_dtype="bf16", recompute_granularity="full" if args.recompute else None)
    model = build_model(registry.get("idefics2"), config, topology, options)
    parameters = 0
    for parameter in model.stages[0].parameters():
        parameters += parameter.numel()
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    model = wrap_model(model, parallel)
    settings = OptimizerConfig(lr=1e-5)
    optimizer = build_optimizer(settings, model)
    set_learning_rates(optimizer, dict.fromkeys(("llm", "vision", "connector"), settings.lr), settings.weight_decay)
    image = 56 if args.tiny else IMAGE
    rows = [make_row(config, args.row, image, seed) for seed in range(args.accumulate)]
    seconds, loss = [], 0.0
    for _ in range(args.warm_up + args.steps):
        start = clock(device)
        loss = train_step(model, optimizer, rows).loss
        seconds.append(clock(device) - start)
    step = statistics.median(seconds[args.warm_up :])
    images = [(3, image, image)] * sum(len(row.pixels) for row in rows)
    segments = [n for row in rows for n in row.cu_seqlens.diff().tolist()]
    supervised = sum(row.num_supervised for row in rows)
    flops = forward_flops(config, images=images, segments=segments, supervised=supervised)
    speed = flops.training() / step / 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = next((value for key, value in PEAKS.items() if key in name), None)
    matmul = measured_matmul(device, 256 if args.tiny else 8192)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
    print(f"\n{name}, torch {torch.__version__}, attention: {select_backend(device.type, torch.bfloat16)}")
    print(
        f"{parameters / 1e6:,.0f}M parameters, bf16, fp32 main parameters, {len(rows)} rows of {args.row} tokens a step"
    )
    print("\n| quantity | value |\n| --- | --- |")
    for quantity, value in (
        ("loss of the last step", f"{loss:.3f}"),
        ("seconds a step (median)", f"{step:.3f}"),
        ("real tokens/s", f"{sum(segments) / step:,.0f}"),
        ("images/s", f"{len(images) / step:,.1f}"),
        ("model TFLOP/s", f"{speed:.1f}"),
        ("of which tower and connector", f"{(flops.vision + flops.connector) / flops.forward:.0%}"),
        ("MFU", f"{speed / peak:.1%} of {peak:.0f} TFLOP/s" if peak else "peak of this device not known"),
        ("share of a measured matrix product", f"{speed / matmul:.1%} of {matmul:.0f} TFLOP/s"),
        ("peak memory", f"{memory:.1f} GiB"),
    ):
        print(f"| {quantity} | {value} |")


def main() -> None:
    """Runs both parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy shape")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--row", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--accumulate", type=int, default=2, help="rows of a step")
    parser.add_argument("--recompute", action="store_true")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu_smoke: torch sees no GPU; --device cpu --tiny tries the code without one")
    if args.device == "cuda":
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        cpu.install()
    init_process_group(device)
    attention_errors(device, shrink=16 if args.tiny else 1)
    training_speed(args, device)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
