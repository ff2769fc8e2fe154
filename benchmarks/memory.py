"""Memory by estimate against memory in use: peak of tensors on each stage, over layouts, families and ways of training.

    python benchmarks/memory.py --device cpu      small models on up to 2 processes, every allocation counted by torch's profiler
    python benchmarks/memory.py --device cuda     1 to 2B parameters on one GPU, torch.cuda.max_memory_allocated
    python benchmarks/memory.py --layouts         layouts that are chosen for published models, and why (docs/layouts.md)

Weights are random; a row holds text and images of the sizes said. The estimate (training/memory/estimate.py) is made in a
process of its own, before anything runs.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from megatron_vlm import registry
from megatron_vlm.data.config import DataConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.launch.layout import choose_layout
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.testing import shapes
from megatron_vlm.testing.memory import Case, estimated, measured
from megatron_vlm.training.checkpoint.config import CheckpointConfig
from megatron_vlm.training.memory.stages import RowShape
from megatron_vlm.training.run_config import RunConfig, TrainingConfig

LARGE = {"idefics2": "Idefics2-1.2B", "internvl3": "InternVL3-2B", "llava_internlm2": "LLaVA-InternLM2-1.8B"}
MODELS = ("Idefics2-8B", "InternVL3-8B", "LLaVA-InternLM2-7B")
MACHINES = ((1, 80), (2, 80), (8, 80), (2, 48))
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": dict(target_modules="all-linear", r=16, alpha=32.0),
    "QLoRA": dict(target_modules="all-linear", r=16, alpha=32.0, quantize="nf4"),
}


def cases(small: bool, only: str) -> list[Case]:
    """What is measured; ``only``: where family and name hold this."""
    found = []
    lora = dict(target_modules="all-linear", r=16)
    recompute = dict(recompute_granularity="full")
    images = {
        "idefics2": (3, 140, 168) if small else (3, 378, 378),
        "internvl3": (3, 3 * 112, 112) if small else (3, 3 * 448, 448),
        "llava_internlm2": (3, 112, 112) if small else (3, 336, 336),
    }
    for family, image in images.items():
        model_config = shapes.small()[family] if small else shapes.published()[LARGE[family]][1]
        row = RowShape(segments=(200, 160, 152) if small else (1024,) * 4, images=(image,) * (3 if small else 4))
        case = Case(name="full", family=family, model_config=model_config, row=row)
        found += [
            case,
            replace(case, name="frozen tower", model=dict(freeze_vision=True)),
            replace(case, name="LoRA", peft=lora),
            replace(case, name="LoRA, recompute", peft=lora, parallel=recompute),
            replace(case, name="recompute", parallel=recompute),
        ]
        if not small:
            long = RowShape(segments=(4096,) * 4, images=(image,) * 16)
            found.append(replace(case, name="recompute, 16,384 tokens", parallel=recompute, row=long))
            continue
        two = replace(case, world=2, microbatches=4)
        tp, pp = dict(tensor_model_parallel_size=2), dict(pipeline_model_parallel_size=2)
        found += [
            replace(case, name="fp32", precision="fp32"),
            replace(two, name="tp 2", parallel=tp),
            replace(two, name="tp 2, sequence parallel", parallel=tp | dict(sequence_parallel=True), alone=True),
            replace(two, name="pp 2", parallel=pp),
            replace(two, name="pp 2, virtual stages", parallel=pp | dict(num_layers_per_virtual_pipeline_stage=1)),
            replace(two, name="dp 2, distributed optimizer", parallel=dict(data_parallel_sharding="optimizer")),
        ]
    return [case for case in found if only in f"{case.family} {case.name}"]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layouts", action="store_true", help="print the layouts of published models")
    parser.add_argument("--small", action="store_true", help="small models; always so on the CPU")
    parser.add_argument("--only", default="", help="cases whose family and name, or rows whose model, hold this")
    parser.add_argument("--estimates", action="store_true", help="print the estimates as JSON and stop")
    args = parser.parse_args()
    small = args.small or args.device == "cpu"
    if args.estimates:
        print(json.dumps([estimated(case, args.device) for case in cases(small, args.only)]))
        return
    if args.layouts:
        layouts(args.only)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("memory: torch sees no GPU; --device cpu tries the code without one")
    start = time.monotonic()
    flags = [flag for flag in sys.argv[1:] if flag != "--estimates"]
    done = subprocess.run([sys.executable, __file__, *flags, "--estimates"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if args.device == 'cuda' else 'cpu'}")
    print(f"estimates made in {time.monotonic() - start:.0f} s\n")
    unit, name = (2**20, "MiB") if small else (2**30, "GiB")
    print(
        f"| family | training | stage | measured {name} | estimate {name} | ratio |\n| --- | --- | --- | --- | --- | --- |"
    )
    worst = 0.0
    for case, guessed in zip(cases(small, args.only), json.loads(done.stdout.splitlines()[-1]), strict=True):
        peaks = measured(case, args.device)
        for stage, guess in enumerate(guessed):
            worst = max(worst, abs(guess / peaks[stage] - 1))
            sizes = f"{peaks[stage] / unit:.2f} | {guess / unit:.2f} | {guess / peaks[stage]:.3f}"
            print(f"| {case.family} | {case.name} | {stage} | {sizes} |", flush=True)
    print(f"\nlargest difference {worst:.1%}; {time.monotonic() - start:.0f} s")


def layouts(only: str) -> None:
    """Prints the layout chosen for each model, machine and way of training."""
    print("| model | GPUs | training | layout |\n| --- | --- | --- | --- |")
    for name in (name for name in MODELS if only in name):
        family, model_config = shapes.published()[name]
        for gpus, gib in MACHINES:
            for way, peft in WAYS.items():
                config = RunConfig(
                    data=DataConfig(seq_length=4096, packing=True),
                    peft=PeftConfig(**peft),
                    training=TrainingConfig(dry_run=True, precision="bf16", global_batch_size=64),
                    checkpoint=CheckpointConfig(load="-"),
                )
                try:
                    found = choose_layout(config, registry.get(family), model_config, gpus, gib << 30).reason
                except ConfigError as error:
                    found = str(error)
                print(f"| {name} | {gpus} x {gib} GB | {way} | {found} |", flush=True)


if __name__ == "__main__":
    main()
