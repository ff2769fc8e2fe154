"""What a base in 4 bits saves and costs: bytes of its weights, peak memory and step time of LoRA, against a base in bf16.

    python benchmarks/qlora_memory.py [--device cuda] [--layers 8] [--rank 16] [--tokens 4096] [--steps 10]
    python benchmarks/qlora_memory.py --device cpu --tiny

One process, random weights in the shape of InternLM2-7B, no files and no network. Every case builds the model anew and trains
pairs on all linears of its decoder.
"""

import argparse
import gc
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_vlm import registry
from megatron_vlm.conversion.load import load_model
from megatron_vlm.data.row import EncodedSample, Row, row_from_samples
from megatron_vlm.models.built import global_named_modules
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.rng import seed_step
from megatron_vlm.parallel.topology import Topology, build_topology, init_process_group
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.peft.lora import apply_lora
from megatron_vlm.peft.qlora import quantization_of
from megatron_vlm.peft.select import make_plan
from megatron_vlm.sources.hf import HFSource
from megatron_vlm.training.device import start_device
from megatron_vlm.training.memory.estimate import full_shapes
from megatron_vlm.training.optimizer.build import build_optimizer, set_learning_rates, wrap_model
from megatron_vlm.training.optimizer.config import OptimizerConfig
from megatron_vlm.training.step import train_step
from megatron_vlm.weights.mapping import DerivedTensors, HFModel, TensorInfo

SHAPE = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=92544)
TINY = dict(hidden_size=512, intermediate_size=1408, num_attention_heads=8, num_key_value_heads=2, vocab_size=1024)
REST = dict(model_type="internlm2", max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=1e6, bias=False)
CASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "NF4": dict(quantize="nf4", double_quant=False),
    "NF4, double quantisation": dict(quantize="nf4"),
}


def random_source(hf_config: dict[str, Any]) -> HFSource:
    """A model whose tensors are cut out of one random one."""
    spec = registry.get("internlm2")
    config = spec.config(hf_config)
    shapes = full_shapes(spec, config)
    infos = {
        hf: TensorInfo(dtype=torch.bfloat16, shape=tuple(part.shape))
        for entry in spec.mapping(config)
        for hf, part in zip(entry.hf, entry.from_full(shapes[entry.name].meta()), strict=True)
    }
    largest = max(torch.Size(info.shape).numel() for info in infos.values())
    pool = torch.empty(largest, dtype=torch.bfloat16).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))

    def read(shape: tuple[int, ...]) -> torch.Tensor:
        return pool[: torch.Size(shape).numel()].view(shape) if len(shape) > 1 else torch.ones(shape, dtype=pool.dtype)

    tensors = DerivedTensors(infos, {name: partial(read, info.shape) for name, info in infos.items()})
    return HFSource(HFModel(directory=Path(), config=hf_config, tensors=tensors), spec)


def measure(source: HFSource, topology: Topology, args: argparse.Namespace, settings: dict[str, Any]) -> list[float]:
    """Builds and trains one case.

    Returns:
        Bits of a linear's parameter, GiB of all weights, seconds to load, seconds a step, GiB at the peak (NaN on the CPU).
    """
    device = topology.device
    peft = PeftConfig(target_modules="all-linear", r=args.rank, **settings)
    plan = make_plan(source.spec, source.config, peft, source.infos)
    options = ModelOptions(params_dtype="bf16", recompute_granularity="full" if args.recompute else None)
    start = clock(device)
    model = load_model(source, topology, options, quantization_of(peft, "bf16"))
    loaded = clock(device) - start
    targets = {target.linear for target in plan.targets}
    linears = {name: module for stage in model for name, module in global_named_modules(stage) if name in targets}
    parameters = sum(source.infos[f"{name}.weight"].meta().numel() for name in linears)
    bits = 8 * sum(held(module) for module in linears.values())
    weights = sum(held(stage) for stage in model)
    model = wrap_model(apply_lora(model, plan, seed=0), ParallelConfig())
    optimizer_config = OptimizerConfig(lr=1e-4)
    optimizer = build_optimizer(optimizer_config, model)
    set_learning_rates(optimizer, dict.fromkeys(("llm", "vision", "connector"), 1e-4), optimizer_config.weight_decay)
    row = make_row(args.tokens, source.config.text.vocab_size)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(args.warm_up + args.steps):
        start = clock(device)
        train_step(model, optimizer, [row])
        seconds.append(clock(device) - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return [bits / parameters, weights / 2**30, loaded, statistics.median(seconds[args.warm_up :]), peak]


def held(module: torch.nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def make_row(tokens: int, vocabulary: int) -> Row:
    """Four samples of random text."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (4, tokens // 4), generator=generator)
    none = torch.empty(0, dtype=torch.int64)
    return row_from_samples(
        [
            EncodedSample(key=str(i), input_ids=row, labels=row.clone(), pixels=(), image_positions=none)
            for i, row in enumerate(ids)
        ]
    )


def clock(device: torch.device) -> float:
    """Seconds, after everything that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small shape")
    parser.add_argument("--layers", type=int, default=8, help="of the 32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--recompute", action="store_true")
    args = parser.parse_args()
    device = start_device(args.device)
    source = random_source({**(TINY if args.tiny else SHAPE), **REST, "num_hidden_layers": args.layers})
    init_process_group(device)
    topology = build_topology(ParallelConfig(), num_layers=args.layers, device=device)
    seed_step(topology, 0, 0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}")
    print(f"LoRA of rank {args.rank} on all linears of {args.layers} layers, {args.tokens} tokens a step\n")
    print("| base | bits a parameter | weights, GiB | load, s | step, s | step / bf16 | peak, GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    reference = None
    for case, settings in CASES.items():
        bits, weights, loaded, step, peak = measure(source, topology, args, settings)
        reference = reference or step
        print(
            f"| {case} | {bits:.3f} | {weights:.3f} | {loaded:.1f} | {step:.3f} | {step / reference:.2f} | {peak:.2f} |",
            flush=True,
        )
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
