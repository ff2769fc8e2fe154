"""What a save costs the steps of a run: in the step, and in the background (``checkpoint.async_save``).

    python benchmarks/background_save.py [--steps 60] [--interval 10]

One run of a small model on the CPU that saves every few steps. Steps with a save under way are timed beside those of the same
run without, so that what else the machine does falls on both; and how long a save holds up the run in either way.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.options.resolve import resolve
from megatron_vlm.parallel.heartbeat import Heartbeat
from megatron_vlm.testing.runs import write_shards
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.training.run_config import RunConfig
from megatron_vlm.training.trainer import Trainer


class Timed(Trainer):
    """Keeps the seconds of each step, by whether a save was under way when it began."""

    def __init__(self, config: RunConfig, heartbeat: Heartbeat):
        self.steps: list[tuple[bool, float, float]] = []
        super().__init__(config, heartbeat)

    def _next_rows(self) -> Any:
        self.steps.append((self.saver.in_flight is not None, 0.0, time.process_time()))
        return super()._next_rows()

    def _report(self, result: Any, rates: dict[str, float], seconds: float) -> None:
        super()._report(result, rates, seconds)
        self.steps[-1] = (self.steps[-1][0], seconds, time.process_time() - self.steps[-1][2])


def run(folder: Path, options: argparse.Namespace, how: str) -> str:
    """One run; returns its row of the table."""
    out = folder / f"out{how}"
    words = (
        f"--load {folder / 'twin'} --data-path {folder / 'data' / 'shards'} --seq-length 256 --global-batch-size 2 --lr 1e-3 "
        f"--shortest-edge 24 --device cpu --no-tensorboard --num-workers 0 --save {out} --keep-last 2 "
        f"--train-iters {options.steps} --save-interval {options.interval} {how}"
    )
    with Heartbeat() as heartbeat:
        trainer = Timed(resolve(words.split())[0], heartbeat)
        try:
            trainer.train()
        finally:
            trainer.close()
            torch.distributed.destroy_process_group()
    size = sum(path.stat().st_size for path in next(out.glob("iter_*")).glob("rank*")) / 1e6
    alone, beside = ([step[1:] for step in trainer.steps[3:] if step[0] == kind] for kind in (False, True))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    held = [line["save_seconds"] for line in lines if line.get("save_seconds", 0) > 0]
    said = [f"{size:.0f} MB", f"{len(alone)}, {len(beside)}"]
    for clock in (0, 1):  # of the wall, of this process alone: that one is the same on a busy machine
        least, most = (median([step[clock] for step in steps]) for steps in (alone, beside))
        said.append(f"{least:.3f}, {most:.3f} s ({100 * (most / least - 1):+.1f} %)" if beside else f"{least:.3f} s")
    said.append(f"{median(held):.3f} s" if held else "")
    return f"| {how or 'in the step'} | {' | '.join(said)} | {os.getloadavg()[0]:.1f} |"


def median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--interval", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_idefics2(folder / "twin", layers=4, text_hidden=512, ffn=1024, vision_layers=1)
        write_shards(folder / "data", 24, seed=3)
        print(
            "| saves | size | steps alone, with a save under way | wall time of each | CPU time | held up by a save | load |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for how in ("", "--async-save"):
            print(run(folder, options, how), flush=True)


if __name__ == "__main__":
    main()
