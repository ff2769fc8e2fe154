"""The dry run: real stage modules of a world that is not there."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
from megatron_vlm.cli.train import resolve
from megatron_vlm.conversion.source import open_source
from megatron_vlm.training.dry_run import dry_run
from megatron_vlm.training.memory import estimate

def report(world, argv):
    config, _ = resolve(argv)
    source = open_source(config.checkpoint.load)
    stages = estimate(config, source.spec, source.config, world, "cuda")
    return [vars(stage) for stage in stages], dry_run(config)

print(json.dumps([report(world, argv) for world, argv in json.loads(sys.argv[1])]))
"""


@pytest.fixture
def reports(command):
    """``reports((world, flags), ...)``: stages and printed text of each, from one process without a process group."""

    def make(*runs):
        jobs = json.dumps([(world, command("out", "--dry-run", flags)) for world, flags in runs])
        done = subprocess.run([sys.executable, "-c", SCRIPT, jobs], capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return make


@pytest.mark.slow
def test_stages_of_a_large_world_hold_the_whole_model(reports, twin):
    from safetensors import safe_open

    layout = "--world-size 64 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
    more = "--bf16 --use-distributed-optimizer --freeze-clip-vision-tower --global-batch-size 128"
    (((first, last), text),) = reports((64, f"{layout} {more}"))
    with safe_open(twin / "model.safetensors", "pt") as file:
        whole = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - it has no iterator
    held = sum(first["parameters"].values()) + sum(last["parameters"].values())
    assert whole <= held <= whole + 2 * 8 * 64  # vocabulary padding of embedding and head
    assert (first["ranks"], last["ranks"]) == ([0, 31], [32, 63])
    assert first["trainable"]["vision"] == 0 and last["parameters"]["vision"] == 0
    parameters, trainable = sum(first["parameters"].values()), sum(first["trainable"].values())
    assert (first["weights"], first["gradients"]) == (2 * parameters, 4 * trainable)
    assert first["optimizer"] == -(-12 * trainable // 32)
    assert "world size 64 = tp 1 x pp 2 x dp 32, 2 virtual stages per rank" in text
    assert "use_distributed_optimizer: true" in text


@pytest.mark.slow
def test_tensor_parallelism_and_recomputation_need_less(reports):
    runs = [(1, ""), (2, "--tensor-model-parallel-size 2"), (1, "--recompute-granularity full")]
    one, half, recomputing = (stage for (stage,), _ in reports(*runs))
    assert half["parameters"]["llm"] < 0.55 * one["parameters"]["llm"]
    assert half["activations"] < one["activations"]
    assert recomputing["activations"] < 0.5 * one["activations"]


def test_the_command_prints_it_and_stops(command, tmp_path):
    argv = [sys.executable, "-m", "megatron_vlm", "train", *command("out", "--dry-run --tensor-model-parallel-size")]
    done = subprocess.run([*argv, "3"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error:") and "tensor" in done.stderr
    done = subprocess.run([*argv, "2"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "memory of a rank" in done.stdout
    assert not (tmp_path / "out").exists()
