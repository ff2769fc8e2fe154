"""What a save costs the steps of a run: in the step, and in the background (``checkpoint.async_save``).

    python benchmarks/background_save.py [--steps 60] [--interval 10] [--size 512]

One run of a small model on the CPU that saves every few steps. Steps with a save under way are timed beside those of the same
run without, so that what else the machine does falls on both; and how long a save holds up the run in either way. Last line:
the ratio of both, by the wall's clock and by this process' own; the first wants idle cores, one for the saving process.
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
        self.began = (self.saver.in_flight is not None, time.perf_counter(), time.process_time())
        return super()._next_rows()

    def _commit(self, skipped: bool) -> None:
        super()._commit(skipped)
        under_way, wall, own = self.began
        self.steps.append((under_way, time.perf_counter() - wall, time.process_time() - own))


def run(folder: Path, options: argparse.Namespace, how: str) -> tuple[str, list[float]]:
    """One run; returns its row of the table, and the ratios of steps with a save under way to those without."""
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
    ratios = []
    for clock in (0, 1):  # of the wall, of this process alone: that one is the same on a busy machine
        least, most = (median([step[clock] for step in steps]) for steps in (alone, beside))
        ratios.append(most / least)
        said.append(f"{least:.3f}, {most:.3f} s ({100 * (most / least - 1):+.1f} %)" if beside else f"{least:.3f} s")
    said.append(f"{median(held):.3f} s" if held else "")
    return f"| {how or 'in the step'} | {' | '.join(said)} | {os.getloadavg()[0]:.1f} |", ratios


def median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--interval", type=int, default=10)
    parser.add_argument("--size", type=int, default=512, help="hidden size of the decoder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        width = options.size
        write_tiny_idefics2(folder / "twin", layers=4, text_hidden=width, ffn=2 * width, vision_layers=1)
        write_shards(folder / "data", 24, seed=3)
        print(
            "| saves | size | steps alone, with a save under way | wall time of each | CPU time | held up by a save | load |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for how in ("", "--async-save"):
            row, ratios = run(folder, options, how)
            print(row, flush=True)
    print(f"ratio of a step with a save under way: {ratios[0]:.3f} by the wall's clock, {ratios[1]:.3f} by the CPU's")


if __name__ == "__main__":
    main()
