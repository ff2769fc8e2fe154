"""The benchmarks run: the GPU one with a toy shape on the CPU, the CPU one against its bars."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str, timeout: float) -> tuple[int, str]:
    """Returns (exit code, output)."""
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.full
def test_gpu_smoke_runs_without_a_gpu_on_request():
    toy = ["--device", "cpu", "--tiny", "--steps", "1", "--warm-up", "0", "--row", "512", "--accumulate", "1"]
    code, output = run("gpu_smoke.py", *toy, timeout=300)
    assert code == 0, output[-3000:]
    for row in (
        "| real tokens/s |",
        "| images/s |",
        "| MFU | peak of this device not known |",
        "| tower, 16 heads of 72 |",
    ):
        assert row in output, output


@pytest.mark.gpu
def test_gpu_smoke():
    code, output = run("gpu_smoke.py", "--steps", "5", timeout=1200)
    assert code == 0, output[-3000:]
    assert "| MFU |" in output
    print(output)


@pytest.mark.full
def test_cpu_cost_against_a_transformers_loop():
    """Exit code 0 says that both bars are met."""
    code, output = run("cpu_vs_hf.py", timeout=1800)
    print(output)
    assert code == 0, output


@pytest.mark.full
def test_data_benchmarks_run_in_a_small_form():
    """What they print; their bars are held where they run in full. Exit code 1 says that a bar is missed."""
    code, output = run("loader.py", "--shards", "1000", "--images", "64", timeout=300)
    assert code in (0, 1) and "Traceback" not in output, output
    for figure in ("memory_mb", "resume_s", "samples_per_cpu_s", "decode_ratio"):
        assert f"| {figure} | " in output, output
    code, output = run("packing.py", "fill", timeout=300)
    assert code == 0, output
    code, output = run("data_loading.py", "--share", "0.02", "--images", "16", timeout=300)
    assert code == 0 and output.count("members/s") == 12 and output.count("samples/s") == 2, output
