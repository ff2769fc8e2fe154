"""Vision-language models on one GPU, ours and the transformers Trainer's way in turn: speed, MFU, memory, losses.

    sh benchmarks/vlm_table.sh                                   all parts; what --out has already is not measured again
    python benchmarks/vlm_table.py --parts 8b-lora               one part, which prints alone
    python benchmarks/vlm_table.py --device cpu --tiny           every part in toy shapes, in minutes; its speeds mean nothing

2b       SmolVLM2's shape, all of it trains                8b-lora  Idefics2-8B's shape, LoRA on all linears
8b-qlora the same with its base in NF4

Both sides have the same random weights and the same samples a step: JPEGs that are decoded and resized, texts of 50 to 2000
tokens; each is a process of its own. Ours lays them end to end in rows. The Trainer pads each microbatch to its longest, with
flash attention where it is installed, else sdpa, and liger's kernels where they load. Data is made before the clock starts. MFU
counts operations that are needed, on both sides alike: no padding, no recomputation, the tower's, and those of frozen parts
once. Adapters start from other random numbers on each side, and from nothing added: losses are equal in the first step.
"""

import argparse
import importlib.util
import io
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu_vs_hf import pack, padded
from PIL import Image

from megatron_vlm import registry
from megatron_vlm.conversion.load import load_model
from megatron_vlm.data.row import IGNORE_INDEX, EncodedSample, row_from_samples
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.rng import seed_step
from megatron_vlm.parallel.topology import build_topology, init_process_group
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.peft.lora import apply_lora
from megatron_vlm.peft.qlora import quantization_of
from megatron_vlm.peft.select import make_plan
from megatron_vlm.sources.hf import HFSource
from megatron_vlm.training.device import start_device
from megatron_vlm.training.memory.estimate import full_shapes
from megatron_vlm.training.memory.flops import forward_flops
from megatron_vlm.training.metrics.facts import PEAK_TFLOPS
from megatron_vlm.training.optimizer.build import build_optimizer, set_learning_rates, wrap_model
from megatron_vlm.training.optimizer.config import OptimizerConfig
from megatron_vlm.training.step import train_step
from megatron_vlm.weights.mapping import GROUPS, DerivedTensors, HFModel, TensorInfo

PARTS: dict[str, dict[str, Any]] = {
    "2b": dict(family="smolvlm", peft=None),
    "8b-lora": dict(family="idefics2", peft=dict(target_modules="all-linear", r=16)),
    "8b-qlora": dict(family="idefics2", peft=dict(target_modules="all-linear", r=16, quantize="nf4")),
}
SIDES = ("ours", "hf")
IMAGE_TOKEN, PATCH = 5, 14
FIGURES = ("seconds a step", "real tokens/s", "images/s", "MFU", "peak GiB", "first loss", "last loss", "trained")


def hf_config(family: str, tiny: bool) -> Any:
    """transformers' config of a part: of the published model's shape, or a toy with every part of it."""
    import transformers

    text = dict(
        model_type="llama" if family == "smolvlm" else "mistral", vocab_size=49280 if family == "smolvlm" else 32003,
        max_position_embeddings=32768, rms_norm_eps=1e-5, pad_token_id=0,
    )  # fmt: skip
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    if tiny:
        text |= dict(zip(names, (64, 176, 2, 4, 2)), vocab_size=512)
    elif family == "smolvlm":
        text |= dict(
            zip(names, (2048, 8192, 24, 32, 32)), rope_parameters=dict(rope_type="default", rope_theta=130000.0)
        )
    else:
        text |= dict(zip(names, (4096, 14336, 32, 32, 8)), sliding_window=4096)
    vision: dict[str, Any] = dict(zip(names, (48, 96, 2, 4) if tiny else (1152, 4304, 27, 16)))
    vision |= dict(image_size=side(family, tiny), patch_size=PATCH)
    common = dict(image_token_id=IMAGE_TOKEN, tie_word_embeddings=False)
    if family == "smolvlm":
        common |= dict(scale_factor=3, pad_token_id=0)
        return transformers.SmolVLMConfig(text_config=text, vision_config=vision, **common)
    perceiver = dict(resampler_n_latents=64, resampler_depth=3, resampler_n_heads=16, resampler_head_dim=96)
    perceiver["num_key_value_heads"] = 2 if tiny else 4
    if tiny:
        perceiver |= dict(resampler_n_latents=8, resampler_depth=1, resampler_n_heads=4, resampler_head_dim=16)
    return transformers.Idefics2Config(text_config=text, vision_config=vision, perceiver_config=perceiver, **common)


def side(family: str, tiny: bool) -> int:
    """Most pixels of an image's side."""
    return (84 if tiny else 378) if family == "smolvlm" else (112 if tiny else 980)


def weight(name: str, shape: tuple[int, ...], pool: torch.Tensor) -> torch.Tensor:
    """The tensor of a model on either side: random; norms' 1, biases 0."""
    if len(shape) > 1:
        return pool[: torch.Size(shape).numel()].view(shape)
    return (torch.zeros if name.endswith("bias") else torch.ones)(shape, dtype=pool.dtype)


def make_pool(number: int) -> torch.Tensor:
    """bf16 numbers that weights are cut out of."""
    return torch.empty(number, dtype=torch.bfloat16).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))


def make_samples(family: str, tiny: bool, number: int, image_tokens: int, vocabulary: int) -> list[EncodedSample]:
    """Texts log-normal from 50 to 2000 tokens (median 200), none to two pictures each, decoded from JPEG."""
    generator = torch.Generator().manual_seed(7)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def picture() -> torch.Tensor:
        size = (draw(3, 6), draw(3, 6)) if tiny else (draw(300, 1000), draw(300, 1000))
        small = torch.rand(3, 8, 8, generator=generator)[None]
        smooth = torch.nn.functional.interpolate(small, size=size, mode="bicubic", align_corners=False)[0].clamp(0, 1)
        file = io.BytesIO()
        Image.fromarray((smooth * 255).byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
        decoded, most = Image.open(io.BytesIO(file.getvalue())), side(family, tiny)
        scale = most / max(decoded.size) if tiny else min(1.0, most / max(decoded.size))
        fits = [max(PATCH, round(edge * scale) // PATCH * PATCH) for edge in decoded.size]
        decoded = decoded.resize((most, most) if family == "smolvlm" else (fits[0], fits[1]))
        values = torch.frombuffer(bytearray(decoded.tobytes()), dtype=torch.uint8).view(
            decoded.height, decoded.width, 3
        )
        return values.permute(2, 0, 1) / 127.5 - 1

    samples = []
    for index in range(number):
        words = int(torch.empty(()).log_normal_(5.3, 1.0, generator=generator).clamp(50, 200 if tiny else 2000))
        pixels = tuple(picture() for _ in range(draw(0, 2)))
        ids = torch.randint(10, vocabulary - 8, (words + len(pixels) * image_tokens,), generator=generator)
        positions = torch.arange(4, 4 + len(pixels) * image_tokens)
        ids[positions] = IMAGE_TOKEN
        labels = ids.clone()
        labels[: 4 + len(positions)] = IGNORE_INDEX
        samples.append(
            EncodedSample(key=str(index), input_ids=ids, labels=labels, pixels=pixels, image_positions=positions)
        )
    return samples


def clock(device: torch.device) -> float:
    """Seconds, after everything that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train_ours(
    args: argparse.Namespace, config: Any, batches: list[list[EncodedSample]]
) -> tuple[list[float], list[float], int]:
    """Seconds and losses of the steps, and how many parameters train."""
    spec, device, peft = registry.get(PARTS[args.part]["family"]), args.torch_device, PARTS[args.part]["peft"]
    model_config = spec.config(config.to_dict())
    shapes = full_shapes(spec, model_config)
    infos = {
        hf: TensorInfo(dtype=torch.bfloat16, shape=tuple(part.shape))
        for entry in spec.mapping(model_config)
        for hf, part in zip(entry.hf, entry.from_full(shapes[entry.name].meta()), strict=True)
    }
    pool = make_pool(max(torch.Size(info.shape).numel() for info in infos.values()))
    tensors = DerivedTensors(infos, {name: partial(weight, name, info.shape, pool) for name, info in infos.items()})
    source = HFSource(HFModel(directory=Path(), config=config.to_dict(), tensors=tensors), spec)
    init_process_group(device)
    topology = build_topology(ParallelConfig(), num_layers=model_config.text.num_layers, device=device)
    seed_step(topology, 0, 0)
    recompute = "full" if args.recompute else None
    impl = args.transformer_impl or ("fused" if device.type == "cuda" else "local")
    options = ModelOptions(params_dtype="bf16", recompute_granularity=recompute, transformer_impl=impl)
    if peft is None:
        model = load_model(source, topology, options)
    else:
        settings = PeftConfig(**peft)
        plan = make_plan(spec, model_config, settings, source.infos)
        model = apply_lora(load_model(source, topology, options, quantization_of(settings, "bf16")), plan, seed=0)
    model = wrap_model(model, ParallelConfig())
    settings = OptimizerConfig(lr=args.lr, weight_decay=0.0)
    optimizer = build_optimizer(settings, model)
    set_learning_rates(optimizer, dict.fromkeys(GROUPS, args.lr), 0.0)
    trained = sum(p.numel() for _, p in model.named_parameters() if p.requires_grad)
    seconds, losses = [], []
    for batch in batches:
        rows = [row_from_samples(samples) for samples in pack(batch, args.row)]
        start = clock(device)
        losses.append(train_step(model, optimizer, rows).loss)
        seconds.append(clock(device) - start)
    return seconds, losses, trained


def train_hf(
    args: argparse.Namespace, config: Any, batches: list[list[EncodedSample]]
) -> tuple[list[float], list[float], int]:
    """The same by ``transformers.Trainer``."""
    import transformers
    from torch.utils.data import DataLoader

    device, peft, on_gpu = args.torch_device, PARTS[args.part]["peft"], args.torch_device.type == "cuda"
    flash = on_gpu and importlib.util.find_spec("flash_attn") is not None
    with device:
        model = transformers.AutoModelForImageTextToText.from_config(
            config, dtype=torch.bfloat16, attn_implementation="flash_attention_2" if flash else "sdpa"
        )
    pool = make_pool(max(p.numel() for p in model.parameters()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weight(name, tuple(parameter.shape), pool))
    if peft is not None:
        from peft import LoraConfig, get_peft_model

        if peft.get("quantize"):
            quantize(model)
        model = get_peft_model(model, LoraConfig(r=peft["r"], target_modules=peft["target_modules"]))
    seconds: list[float] = []
    started = [0.0]

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *unused: Any, **more: Any) -> None:
            started[0] = clock(device)

        def on_step_end(self, *unused: Any, **more: Any) -> None:
            seconds.append(clock(device) - started[0])

    class InOrder(transformers.Trainer):
        def get_train_dataloader(self) -> DataLoader:
            samples: Any = [sample for batch in batches for sample in batch]
            return DataLoader(samples, batch_size=args.hf_batch, collate_fn=partial(padded, dtype=torch.bfloat16))

    arguments = transformers.TrainingArguments(
        output_dir=str(args.out / "hf"), per_device_train_batch_size=args.hf_batch, max_steps=len(batches), logging_steps=1,
        gradient_accumulation_steps=len(batches[0]) // args.hf_batch, bf16=on_gpu, use_cpu=not on_gpu, disable_tqdm=True,
        learning_rate=args.lr, lr_scheduler_type="constant", weight_decay=0.0, report_to="none", save_strategy="no",
        optim="adamw_torch_fused" if on_gpu else "adamw_torch", remove_unused_columns=False,
        use_liger_kernel=on_gpu and importlib.util.find_spec("liger_kernel") is not None,
        gradient_checkpointing=args.recompute,
    )  # fmt: skip
    trainer = InOrder(model=model, args=arguments, callbacks=[Clock()], train_dataset=[0] * sum(map(len, batches)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trainer.train()
    return seconds, [line["loss"] for line in trainer.state.log_history if "loss" in line], trained


def quantize(model: torch.nn.Module) -> None:
    """Linears but the head in NF4, double quantisation, as transformers' BitsAndBytesConfig makes them."""
    import bitsandbytes as bnb

    for module in list(model.modules()):
        for child, linear in list(module.named_children()):
            if isinstance(linear, torch.nn.Linear) and child != "lm_head":
                sizes = linear.in_features, linear.out_features, linear.bias is not None
                made, place = (
                    bnb.nn.Linear4bit(*sizes, torch.bfloat16, True, "nf4", device="meta"),
                    linear.weight.device,
                )
                codes = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                made.weight = codes.to(place)
                made.bias = linear.bias
                setattr(module, child, made)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One side of one part, in this process."""
    args.torch_device = start_device(args.device)
    part = PARTS[args.part]
    config = hf_config(part["family"], args.tiny)
    model_config = registry.get(part["family"]).config(config.to_dict())
    latents = getattr(getattr(config, "perceiver_config", None), "resampler_n_latents", None)
    tokens = latents or (side(part["family"], args.tiny) // PATCH // 3) ** 2
    number = args.steps + args.warm_up
    samples = make_samples(part["family"], args.tiny, number * args.batch, tokens, config.text_config.vocab_size)
    batches = [samples[i * args.batch : (i + 1) * args.batch] for i in range(number)]
    seconds, losses, trained = (train_ours if args.side == "ours" else train_hf)(args, config, batches)
    timed = [sample for batch in batches[args.warm_up :] for sample in batch]
    flops = forward_flops(
        model_config,
        images=[(p.shape[0], p.shape[1], p.shape[2]) for sample in timed for p in sample.pixels],
        segments=[len(sample.input_ids) for sample in timed],
        supervised=sum(int((sample.labels != IGNORE_INDEX).sum()) for sample in timed),
    )
    adapted = list(GROUPS) if part["peft"] else []
    total = sum(seconds[args.warm_up :])
    on_gpu = args.torch_device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    peak = next((value for key, value in PEAK_TFLOPS.items() if key in name), None)
    return {
        "device": name,
        "torch": torch.__version__,
        "seconds a step": statistics.median(seconds[args.warm_up :]),
        "real tokens/s": sum(len(sample.input_ids) for sample in timed) / total,
        "images/s": sum(len(sample.pixels) for sample in timed) / total,
        "MFU": flops.training(adapted, adapted) / total / 1e12 / peak if peak else None,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "first loss": losses[0],
        "last loss": losses[-1],
        "losses": losses,
        "trained": trained,
    }


def table(args: argparse.Namespace, part: str) -> str:
    """The rows of a part, of what has been measured."""
    lines = [f"### {part}", "", f"| | {' | '.join(FIGURES)} |", "| --- " * (len(FIGURES) + 1) + "|"]
    found = {
        side: json.loads(file.read_text()) for side in SIDES if (file := args.out / f"{part}-{side}.json").exists()
    }
    for name, result in found.items():
        if "failed" in result:
            lines.append(f"| {name} | failed: {result['failed']} |")
            continue
        values = [result[figure] for figure in FIGURES]
        lines.append(
            f"| {name} | "
            + " | ".join("-" if v is None else f"{v:,}" if v == int(v) else f"{v:,.4g}" for v in values)
            + " |"
        )
    both = [result for result in found.values() if "losses" in result]
    if len(both) == 2:
        off = [abs(a - b) / b for a, b in zip(*(result["losses"] for result in both))]
        lines += ["", f"losses differ by {off[0]:.1e} in the first step and by {max(off):.1e} at most, relative"]
        ratio = both[1]["seconds a step"] / both[0]["seconds a step"]
        lines += [f"{both[0]['device']}, torch {both[0]['torch']}; a step of ours is {ratio:.2f} times as fast"]
    return "\n".join(lines)


def main() -> None:
    """Measures what is not measured yet, and prints each part once it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy shapes")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each side")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32, help="samples of a step")
    parser.add_argument("--row", type=int, default=8192, help="most tokens of a row of ours")
    parser.add_argument("--hf-batch", type=int, default=4, help="samples of a microbatch of the Trainer")
    parser.add_argument("--recompute", action="store_true", help="activations, on both sides")
    parser.add_argument(
        "--transformer-impl", choices=("local", "fused"), help="of ours; fused on a GPU, local on the CPU"
    )
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds of one side of one part")
    parser.add_argument("--out", type=Path, default=Path("vlm_table"), help="folder of what was measured")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("vlm_table: torch sees no GPU; --device cpu --tiny tries the code without one")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.side:
        args.part = args.parts[0]
        result = measure(args)
        (args.out / f"{args.part}-{args.side}.json").write_text(json.dumps(result))
        return
    failed = False
    for part in args.parts:
        for name in SIDES:
            file = args.out / f"{part}-{name}.json"
            if file.exists() and "failed" not in json.loads(file.read_text()):
                continue
            command = [sys.executable, *sys.argv, "--parts", part, "--side", name]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit)
                last = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
            except subprocess.TimeoutExpired:
                last = f"not done after {args.limit:.0f} s"
            if last:
                file.write_text(json.dumps({"failed": last}))
                failed = True
        print(table(args, part), "\n", flush=True)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
