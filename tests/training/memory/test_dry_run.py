"""The dry run: real stage modules of a world that is not there."""

import pytest

from megatron_vlm.testing import commands
from megatron_vlm.testing.distributed import run_alone


def report(runs):
    """Stages and printed text of each (world, argv), in a process without a process group."""
    from megatron_vlm.conversion.open_source import open_source
    from megatron_vlm.options.resolve import resolve
    from megatron_vlm.training.memory.dry_run import dry_run
    from megatron_vlm.training.memory.estimate import estimate

    found = []
    for world, argv in runs:
        config, _ = resolve(argv)
        source = open_source(config.checkpoint.load)
        stages = estimate(config, source.spec, source.config, world, "cuda")
        found.append(([vars(stage) for stage in stages], dry_run(config)))
    return found


@pytest.fixture
def reports(command):
    """``reports((world, flags), ...)``."""
    return lambda *runs: run_alone(report, [(world, command("out", "--dry-run", flags)) for world, flags in runs])


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
    assert (first["ranks"], last["ranks"]) == ((0, 31), (32, 63))
    assert first["trainable"]["vision"] == 0 and last["parameters"]["vision"] == 0
    parameters, trainable = sum(first["parameters"].values()), sum(first["trainable"].values())
    assert (first["weights"], first["gradients"]) == (2 * parameters, 4 * trainable)
    assert first["optimizer"] == -(-12 * trainable // 32)
    assert "world size 64 = tp 1 x pp 2 x dp 32, 2 virtual stages per rank" in text
    assert "data_parallel_sharding: optimizer" in text


@pytest.mark.slow
def test_tensor_parallelism_and_recomputation_need_less(reports):
    runs = [(1, ""), (2, "--tensor-model-parallel-size 2"), (1, "--recompute-granularity full")]
    one, half, recomputing = (stage for (stage,), _ in reports(*runs))
    assert half["parameters"]["llm"] < 0.55 * one["parameters"]["llm"]
    assert half["activations"] < one["activations"]
    assert recomputing["activations"] < 0.5 * one["activations"]


def test_the_command_prints_it_and_stops(command, tmp_path):
    argv = ["train", *command("out", "--dry-run --tensor-model-parallel-size")]
    done = commands.run([*argv, "3"])
    assert done.returncode == 1 and done.stderr.startswith("error:") and "tensor" in done.stderr
    done = commands.run([*argv, "2"])
    assert done.returncode == 0 and "memory of a rank" in done.stdout
    assert not (tmp_path / "out").exists()
