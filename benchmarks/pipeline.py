"""A pipeline of 4 stages that really runs, on a simulated clock: even stages, balanced ones, images ahead of the schedule.

    python benchmarks/pipeline.py             a toy Idefics2 with a heavy tower, 4 gloo ranks, 1F1B; two minutes of CPU time

Ranks share this machine's processors, so that nobody's wall clock tells anything. Each rank takes the CPU seconds of its own
thread in every forward and backward pass (the least of several steps); the step is what 1F1B makes of them
(megatron_vlm/parallel/pipeline_time.py). Beside it stands what training/balance.py predicts by counting operations.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

RANKS, ROWS, STEPS, TOKENS = 4, 8, 3, 384
IMAGES = [(112, 112)] * 8
SHAPE: dict[str, Any] = dict(
    text="llama", text_hidden=256, ffn=688, layers=16, vision_hidden=256, vision_ffn=688, vision_layers=6, patch_size=14,
    image_size=112,
)  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "even": {},
    "auto": {"decoder_layers_per_stage": "auto"},
    "auto, images ahead": {"decoder_layers_per_stage": "auto", "vision_parallel": "ahead"},
}


def measured(directory: str, rows: list[Any], parallel: dict[str, Any]) -> tuple[list[float], list[float], float]:
    """On a rank: CPU seconds of each forward pass, of each backward pass, and of what runs ahead of and after the schedule."""
    from megatron.core.pipeline_parallel import schedules

    from megatron_vlm.testing.parity import wrapped_for_test
    from megatron_vlm.training import ahead, step
    from megatron_vlm.training.optimizer.build import OptimizerConfig

    model = wrapped_for_test(directory, parallel, {}, None, OptimizerConfig())[0]
    taken: dict[str, list[float]] = {}

    def timed(module: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                taken.setdefault(name, []).append(time.thread_time() - began)

        setattr(module, name, call)

    for module, name in (
        (schedules, "forward_step"),
        (schedules, "backward_step"),
        (step, "encode_ahead"),
        (ahead, "finish"),
    ):
        timed(module, name)
    best: dict[str, list[float]] = {}
    for _ in range(STEPS):
        taken.clear()
        for stage in model:
            stage.zero_grad_buffer()
        step.run_schedule(model, rows, forward_only=False)
        best = {name: list(map(min, zip(best.get(name, values), values))) for name, values in taken.items()}
    return (
        best["forward_step"],
        best["backward_step"],
        sum(sum(best.get(name, [])) for name in ("encode_ahead", "finish")),
    )


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    from megatron_vlm.conversion.open_source import open_source
    from megatron_vlm.data.config import DataConfig
    from megatron_vlm.data.row import row_from_samples
    from megatron_vlm.parallel.config import ParallelConfig
    from megatron_vlm.parallel.pipeline_time import step_seconds
    from megatron_vlm.testing.distributed import run_distributed
    from megatron_vlm.testing.parity import random_samples
    from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
    from megatron_vlm.training.balance import planned
    from megatron_vlm.training.checkpoint.config import CheckpointConfig
    from megatron_vlm.training.memory.stages import RowShape
    from megatron_vlm.training.run_config import RunConfig, TrainingConfig

    with tempfile.TemporaryDirectory() as directory:
        write_tiny_idefics2(directory, **SHAPE)
        with open_source(directory) as source:
            model_config = source.config
        latents = model_config.perceiver.num_latents
        text = TOKENS - len(IMAGES) * (latents + 2)
        rows = [row_from_samples(random_samples(model_config, [(IMAGES, text)], seed=n)) for n in range(ROWS)]
        shape = RowShape(segments=(len(rows[0].input_ids),), images=tuple((3, *size) for size in IMAGES))
        first: tuple[float, float] | None = None
        print(f"{ROWS} rows of {shape}, {RANKS} stages of {model_config.text.num_layers} decoder layers\n")
        print("| | layers | CPU seconds of each stage | step, simulated | of even | predicted | off |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name, way in WAYS.items():
            parallel = {"pipeline_model_parallel_size": RANKS, **way}
            run = RunConfig(
                data=DataConfig(seq_length=sum(shape.segments), packing=True),
                parallel=ParallelConfig(**parallel),
                training=TrainingConfig(dry_run=True, global_batch_size=ROWS),
                checkpoint=CheckpointConfig(load="-"),
            )
            run, step = planned(run, model_config, run.parallel.grid(RANKS), row=shape)
            if run.parallel.decoder_layers_per_stage:
                parallel["decoder_layers_per_stage"] = run.parallel.decoder_layers_per_stage
            found = run_distributed(measured, directory, rows, parallel, pp=RANKS, timeout=1200)
            forward, backward, beside = zip(*found)
            seconds = step_seconds(forward, backward) + max(beside)
            of_stages = ", ".join(f"{sum(f) + sum(b) + more:.2f}" for f, b, more in found)
            first = first or (seconds, step.time)
            ratio, predicted = seconds / first[0], step.time / first[1]
            print(
                f"| {name} | {', '.join(map(str, step.layers))} | {of_stages} | {seconds:.2f} s | {ratio:.2f} | "
                f"{predicted:.2f} | {ratio / predicted - 1:+.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
