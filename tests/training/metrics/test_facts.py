"""Facts of steps: operations of what trains, sources of the samples of a step, on ranks of a real run."""

import pytest

from megatron_vlm.line_files import json_lines
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.runs import train, write_shards
from megatron_vlm.training.memory.flops import Flops


def test_operations_of_frozen_and_adapted_parts():
    flops = Flops(vision=1.0, connector=10.0, llm=100.0)
    assert flops.training() == 333 and flops.training(["vision"]) == 1 + 30 + 300
    assert flops.training(["vision", "connector", "llm"], ["llm"]) == 1 + 10 + 200  # gradients flow, none of weights
    assert flops.training(["vision", "connector", "llm"], ["vision", "llm"]) == 222


def test_a_run_counts_its_sources_and_operations(command, tmp_path):
    """Two sources at 3 to 1 over two epochs; a second run trains adapters alone, for two thirds of the decoder's work."""
    other = write_shards(tmp_path / "other", 12, seed=5)
    argv = command("full", "--train-iters 6 --lr-warmup-iters 1")
    data = argv.index("--data-path") + 1
    argv[data : data + 1] = ["0.75", argv[data], "0.25", str(other)]
    lora = [
        *argv[: argv.index("--output-dir")],
        "--output-dir",
        str(tmp_path / "lora"),
        "--make-vocab-size-divisible-by",
        "8",
    ]
    lora += ["peft.r=4", "peft.target_modules=all-linear", "--train-iters", "6"]
    assert run_distributed(train, argv) == run_distributed(train, lora) == [(0, "")]
    full, adapted = (json_lines(tmp_path / name / "metrics.jsonl") for name in ("full", "lora"))
    assert all(sum(line["sources"]) == 4 for line in full)
    first, second = (sum(column) for column in zip(*(line["sources"] for line in full)))
    assert first + second == 24 and abs(first - 18) <= 3
    start = json_lines(tmp_path / "full" / "starts.jsonl")[0]
    assert list(start["data"]["mixture"])[1] == str(other) and sum(start["trained"].values()) > 100_000
    work = [[line["tflops"] * line["step_seconds"] for line in lines] for lines in (full, adapted)]
    for one, two in zip(*work):
        assert two == pytest.approx(one * 2 / 3, rel=0.02)  # all parts adapted: forward, and gradients of activations
