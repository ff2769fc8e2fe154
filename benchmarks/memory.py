"""Memory by estimate against memory in use: peak of tensors on each stage, over layouts, families and ways of training.

    python benchmarks/memory.py --device cpu      small models on up to 4 processes, every allocation counted by torch's profiler
    python benchmarks/memory.py --device cuda     1 to 2B parameters on one GPU, torch.cuda.max_memory_allocated

Weights are random; a row holds text and images of the sizes said. The estimate (training/memory.py) is made in a process of its
own, before anything runs.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vlm.conversion.mapping import TensorInfo
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.types import PackedRow
from megatron_vlm.models import registry
from megatron_vlm.models.clip import ClipConfig
from megatron_vlm.models.idefics2.config import Idefics2ModelConfig, PerceiverConfig
from megatron_vlm.models.idefics2.config import VisionConfig as SiglipConfig
from megatron_vlm.models.internvl3.config import InternVL3ModelConfig
from megatron_vlm.models.internvl3.config import VisionConfig as InternVitConfig
from megatron_vlm.models.llava_internlm2.config import LlavaModelConfig
from megatron_vlm.models.text import TextConfig
from megatron_vlm.parallel import cpu
from megatron_vlm.parallel.topology import ParallelConfig, init_process_group
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.training.checkpoint import CheckpointConfig
from megatron_vlm.training.memory import RowShape, adapt, estimate, make_batch
from megatron_vlm.training.run_config import ModelConfig, RunConfig, TrainingConfig


def text(hidden: int, ffn: int, layers: int, heads: int, groups: int, vocab: int, **more: Any) -> TextConfig:
    """A decoder."""
    return TextConfig(
        model_type="llama", hidden_size=hidden, ffn_hidden_size=ffn, num_layers=layers, num_attention_heads=heads,
        num_query_groups=groups, head_dim=hidden // heads, vocab_size=vocab, max_position_embeddings=32768,
        norm_epsilon=1e-5, rotary_base=10000.0, **more,
    )  # fmt: skip


def tower(kind: Any, hidden: int, layers: int, heads: int, size: int, **more: Any) -> Any:
    """A vision tower."""
    return kind(
        hidden_size=hidden, ffn_hidden_size=4 * hidden, num_layers=layers, num_attention_heads=heads, image_size=size,
        patch_size=14, num_channels=3, norm_epsilon=1e-6, **more,
    )  # fmt: skip


def models(small: bool) -> dict[str, Any]:
    """Family -> model configuration: of the published shapes of 1 to 2B, or a few million parameters."""
    vit: dict[str, Any] = dict(norm_type="layer_norm", qkv_bias=True, qk_norm=False)
    perceiver: dict[str, Any] = dict(num_latents=64, depth=3, norm_epsilon=1e-6)
    clip: dict[str, Any] = dict(hidden_act="quick_gelu", select_layer=-2)
    if small:
        decoder = text(256, 640, 4, 8, 4, 2048)
        return {
            "idefics2": Idefics2ModelConfig(
                text=decoder, vision=tower(SiglipConfig, 128, 3, 4, 224), image_token_id=5,
                perceiver=PerceiverConfig(num_attention_heads=8, num_query_groups=2, head_dim=32, **perceiver),
            ),
            "internvl3": InternVL3ModelConfig(
                text=text(256, 640, 4, 8, 4, 2048, qkv_bias=True), vision=tower(InternVitConfig, 128, 3, 4, 112, **vit),
                shuffle=2, image_token_id=None, layout="chat",
            ),
            "llava_internlm2": LlavaModelConfig(
                text=decoder, vision=tower(ClipConfig, 128, 4, 4, 112, **clip), image_token_id=5,
                source_type="internlm2", source_vocab_size=2048,
            ),
        }  # fmt: skip
    return {
        "idefics2": Idefics2ModelConfig(  # of benchmarks/gpu_smoke.py
            text=text(2048, 5632, 16, 16, 8, 32003), vision=tower(SiglipConfig, 768, 12, 12, 980), image_token_id=5,
            perceiver=PerceiverConfig(num_attention_heads=16, num_query_groups=4, head_dim=96, **perceiver),
        ),
        "internvl3": InternVL3ModelConfig(  # InternVL3-2B
            text=text(1536, 8960, 28, 12, 2, 151674, qkv_bias=True),
            vision=tower(InternVitConfig, 1024, 24, 16, 448, **vit), shuffle=2, image_token_id=None, layout="chat",
        ),
        "llava_internlm2": LlavaModelConfig(  # LLaVA-InternLM2-1.8B
            text=text(2048, 8192, 24, 16, 8, 92545), vision=tower(ClipConfig, 1024, 24, 16, 336, **clip), image_token_id=5,
            source_type="internlm2", source_vocab_size=92544,
        ),
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run to measure.

    Attributes:
        name: of the way of training.
        family: of the model.
        row: a microbatch.
        parallel, model, peft: settings of these sections.
        world: ranks.
        microbatches: of a step, over all replicas.
        precision: of the run.
        alone: one rank whose collectives do nothing stands for all: gloo's own copies are left out.
    """

    name: str
    family: str
    row: RowShape
    parallel: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    peft: dict[str, Any] = field(default_factory=dict)
    world: int = 1
    microbatches: int = 1
    precision: str = "bf16"
    alone: bool = False

    def config(self) -> RunConfig:
        """The run."""
        return RunConfig(
            data=DataConfig(seq_length=sum(self.row.segments), packing=True),
            model=ModelConfig(**self.model),
            peft=PeftConfig(**self.peft),
            parallel=ParallelConfig(**self.parallel),
            training=TrainingConfig(dry_run=True, precision=self.precision, global_batch_size=self.microbatches),
            checkpoint=CheckpointConfig(load="-"),
        )


def cases(small: bool, only: str) -> list[Case]:
    """What is measured."""
    found = []
    lora: dict[str, Any] = dict(target_modules="all-linear", r=16)
    images: dict[str, tuple[int, int, int]] = {
        "idefics2": (3, 140, 168) if small else (3, 378, 378),
        "internvl3": (3, 3 * 112, 112) if small else (3, 3 * 448, 448),
        "llava_internlm2": (3, 112, 112) if small else (3, 336, 336),
    }
    for family, image in images.items():
        if small:
            row = RowShape(segments=(200, 160, 152), images=(image,) * 3)
            tp = dict(tensor_model_parallel_size=2)
            pp = dict(pipeline_model_parallel_size=2)
            for name, world, parallel in (
                ("tp 1", 1, {}),
                ("tp 2", 2, tp),
                ("tp 2, sequence parallel", 2, tp | dict(sequence_parallel=True)),
                ("pp 2", 2, pp),
                ("pp 2, virtual stages", 2, pp | dict(num_layers_per_virtual_pipeline_stage=1)),
                ("dp 2, distributed optimizer", 2, dict(use_distributed_optimizer=True)),
                ("recompute", 1, dict(recompute_granularity="full")),
            ):
                alone = "sequence_parallel" in parallel
                case = Case(
                    name=name, family=family, row=row, parallel=parallel, world=world, microbatches=4, alone=alone
                )
                found.append(case)
            found.append(Case(name="frozen tower", family=family, row=row, model=dict(freeze_vision=True)))
            found.append(Case(name="fp32", family=family, row=row, precision="fp32"))
            found.append(Case(name="LoRA", family=family, row=row, peft=lora))
            continue
        row = RowShape(segments=(1024,) * 4, images=(image,) * 4)
        row4 = RowShape(segments=(4096,) * 4, images=(image,) * 16)
        full = dict(recompute_granularity="full")
        found += [
            Case(name="full", family=family, row=row),
            Case(name="frozen tower", family=family, row=row, model=dict(freeze_vision=True)),
            Case(name="LoRA", family=family, row=row, peft=lora),
            Case(name="LoRA, recompute", family=family, row=row, peft=lora, parallel=full),
            Case(name="recompute", family=family, row=row, parallel=full),
            Case(name="recompute, 16,384 tokens", family=family, row=row4, parallel=full),
        ]
    return [case for case in found if only in f"{case.family} {case.name}"]


def measure(case: Case, small: bool, device_type: str) -> tuple[int, int]:
    """On a rank: (number of its stage, peak bytes of tensors) over two steps."""
    from megatron_vlm.models.vlm import ModelOptions, build_model, global_parameters
    from megatron_vlm.parallel.rng import seed_step
    from megatron_vlm.parallel.topology import build_topology, destroy_topology
    from megatron_vlm.training.optimizer import OptimizerConfig, build_optimizer, set_learning_rates, wrap_model
    from megatron_vlm.training.step import train_step

    config, model_config, device = case.config(), models(small)[case.family], torch.device(device_type)
    peak = _PeakOnCpu() if device.type == "cpu" else _PeakOnGpu()
    with peak:
        topology = build_topology(config.parallel, num_layers=model_config.text.num_layers, device=device)
        seed_step(topology, 0, 0)
        options = ModelOptions(**config.model_options())
        chunks: list[Any] = build_model(registry.get(case.family), model_config, topology, options)
        for chunk in chunks:
            for parameter in chunk.parameters():
                torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
        if config.peft.active:  # on one rank: its tensors are the whole ones
            infos = {name: TensorInfo.of(parameter) for name, parameter in global_parameters(chunks).items()}
            adapt(config, registry.get(case.family), model_config, topology, infos, chunks)
        chunks = wrap_model(chunks, config.parallel)
        optimizer = build_optimizer(OptimizerConfig(lr=1e-5), chunks, params_dtype=options.torch_dtype)
        rows = [make_row(case.row, model_config)] * (config.num_microbatches_per_batch // topology.dp)
        for step in range(2):
            seed_step(topology, 0, step)
            set_learning_rates(optimizer, dict.fromkeys(("llm", "vision", "connector"), 1e-5), 0.01)
            train_step(chunks, optimizer, rows, topology)
    stage = topology.pp_rank
    del chunks, optimizer
    destroy_topology()
    gc.collect()
    return stage, peak.bytes


def make_row(row: RowShape, model_config: Any) -> PackedRow:
    """A row of that shape with a loss on every token."""
    batch = make_batch(row, sum(row.segments), model_config, pixels=False)
    return PackedRow(
        input_ids=batch.input_ids[0], position_ids=batch.position_ids[0], labels=batch.labels[0], cu_seqlens=batch.cu_seqlens,
        pixels=tuple(torch.randn(image) for image in row.images), image_positions=batch.image_positions, keys=("row",),
    )  # fmt: skip


class _PeakOnCpu:
    """Peak of all that torch's CPU allocator hands out, temporaries inside operations included."""

    def __enter__(self) -> None:
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.profiler.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.profiler.__exit__(*error)
        inner: Any = self.profiler.profiler
        events = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
        now = self.bytes = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            self.bytes = max(self.bytes, now)


class _PeakOnGpu:
    """Peak of torch's CUDA allocator."""

    def __enter__(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def __exit__(self, *error: Any) -> None:
        self.bytes = torch.cuda.max_memory_allocated() - self.before


def estimates(small: bool, device_type: Any, only: str) -> list[list[int]]:
    """Bytes of each stage of each case."""
    found = []
    for case in cases(small, only):
        model_config = models(small)[case.family]
        spec = registry.get(case.family)
        stages = estimate(case.config(), spec, model_config, case.world, device_type, row=case.row)
        found.append([stage.allocated for stage in stages])
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small models; always so on the CPU")
    parser.add_argument("--only", default="", help="cases whose family and name hold this")
    parser.add_argument("--estimates", action="store_true", help="print the estimates as JSON and stop")
    args = parser.parse_args()
    small = args.small or args.device == "cpu"
    if args.estimates:
        print(json.dumps(estimates(small, args.device, args.only)))
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
        peaks = run(case, small, args.device)
        for stage, guess in enumerate(guessed):
            measured = max(peak for number, peak in peaks if number == stage)
            worst = max(worst, abs(guess / measured - 1))
            cells = (
                case.family,
                case.name,
                stage,
                f"{measured / unit:.2f}",
                f"{guess / unit:.2f}",
                f"{guess / measured:.3f}",
            )
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print(f"\nlargest difference {worst:.1%}; {time.monotonic() - start:.0f} s")


def run(case: Case, small: bool, device_type: str) -> list[tuple[int, int]]:
    """(stage, peak) of every rank."""
    if device_type == "cuda":
        torch.cuda.set_device(0)
        init_process_group(torch.device("cuda", 0))
        return [measure(case, small, device_type)]
    if not case.alone:
        return run_distributed(measure, case, small, device_type, dp=case.world, timeout=600)
    cpu.install()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=case.world)
    try:
        return [measure(case, small, device_type)]
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
