"""Checkpoints written while training goes on: the bytes of one written in the step, and the same promises when it fails."""

import os
import resource
import signal
import time
from pathlib import Path

import pytest

from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.runs import metrics_of, train
from megatron_vlm.weights.model_folder import CarriedFiles
from tests.training.checkpoint.ranks import Run


def background_run(hf_dir: str, root: str, parallel: dict, fields: dict):
    """A run, its saves in the background, and ``collect`` of what it is now."""
    from megatron_vlm.training.checkpoint.background import BackgroundSaves
    from megatron_vlm.training.checkpoint.save import Origin, collect

    run = Run(hf_dir, parallel, {}, {"save": root, **fields})
    origin = Origin(hf_files=CarriedFiles(Path(hf_dir)))
    saves = BackgroundSaves(run.config, origin, run.topology.device, lambda: False, lambda: None)
    return run, saves, lambda: collect(run.config, run.model, run.optimizer, {"iteration": run.iteration}, origin)


def in_step_and_in_background(hf_dir: str, root: str, parallel: dict) -> list[str]:
    """Saves the same iterations in both ways, training between the steps of the second; returns files that differ."""
    from dataclasses import replace

    run, saves, collect = background_run(hf_dir, f"{root}/background", parallel, {"keep_last": 2})
    here = run.config
    for steps in (1, 2, 1):
        run.train(steps)
        run.config = replace(here, save=f"{root}/step")
        run.save()
        run.config = here
        assert saves.begin(collect())
        run.train(2)  # the copy is not what is trained now
        saves.wait()
    saves.close()
    folders = [Path(root, name) for name in ("step", "background")]
    files = [{str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()} for folder in folders]
    return [name for name in {**files[0], **files[1]} if not all(name in each for each in files)] + [
        name for name, path in files[0].items() if path.read_bytes() != files[1][name].read_bytes()
    ]


def troubled(hf_dir: str, root: str, fields: dict) -> list[str]:
    """Saves of which rank 1's file may not grow, or its saving process is killed or does not start; returns what each came to."""
    from megatron_vlm.errors import CheckpointError

    fields = {"save_retry_seconds": 0.01, **fields}
    run, saves, collect = background_run(hf_dir, root, {}, fields)
    run.train(1)
    told = []

    def refuse_once(*arguments):
        saves.process.start = start
        raise OSError("no more processes")

    for trouble in ("", "full", "full for long", "killed", "none starts"):
        content = collect()
        try:
            if trouble and run.topology.rank == 1:
                pid = saves.process.pid
                if trouble == "none starts":
                    start, saves.process.start = saves.process.start, refuse_once
                elif trouble == "killed":
                    os.kill(pid, signal.SIGSTOP)
                else:
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            assert saves.begin(content)
            assert saves.iteration == run.iteration or trouble == "none starts"
            if trouble == "killed" and run.topology.rank == 1:
                os.kill(pid, signal.SIGKILL)
            while saves.iteration is not None and saves._flight.phase != "pausing":
                saves.advance()
                time.sleep(0.01)
            if trouble == "full" and run.topology.rank == 1:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            saves.wait()
            told.append("")
        except CheckpointError as error:
            told.append(str(error))
        if trouble == "full for long" and run.topology.rank == 1:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        run.train(1)
    saves.close()
    return [*told, *sorted(path.name for path in Path(root).iterdir())]


@pytest.mark.parametrize("parallel", [{"data_parallel_sharding": "optimizer"}, {"tensor_model_parallel_size": 2}])
def test_the_same_bytes_as_in_the_step(twins, tmp_path, parallel):
    sizes = {"tp": 2} if parallel.get("tensor_model_parallel_size") else {"dp": 2}
    assert run_distributed(in_step_and_in_background, twins("mistral"), str(tmp_path), parallel, **sizes) == [[], []]
    assert (tmp_path / "background" / "latest_checkpointed_iteration.txt").read_text() == "8\n"


def test_a_failed_one_is_tried_again_then_raised_on_every_rank_or_given_up(twins, tmp_path):
    first, second = run_distributed(troubled, twins("mistral"), str(tmp_path / "stop"), {"save_retries": 1}, dp=2)
    assert first == second
    assert first[0] == first[1] == first[3] == "" and "rank1.safetensors failed" in first[2]
    whole = ["iter_0000001", "iter_0000002", "iter_0000004", "latest_checkpointed_iteration.txt"]
    assert first[4] == "" and first[5:] == [*whole[:3], "iter_0000005", whole[3]]
    fields = {"save_retries": 0, "on_save_failure": "continue"}
    first, second = run_distributed(troubled, twins("mistral"), str(tmp_path / "on"), fields, dp=2)
    assert first == second == ["", "", "", "", "", whole[0], whole[3]]


def test_a_run_with_it_ends_as_one_without(command, tmp_path):
    """Saves at every step, so that each waits for the one before; the last is whole when the run ends."""
    argv = {
        out: command(out, f"--save {tmp_path / out} --save-interval 1 --train-iters 5 {more}")
        for out, more in (("step", ""), ("background", "--async-save"))
    }
    for words in argv.values():
        assert run_distributed(train, words, dp=2) == [(0, "")] * 2
    assert metrics_of(tmp_path / "step") == metrics_of(tmp_path / "background")
    lines = (tmp_path / "background" / "metrics.jsonl").read_text().splitlines()
    assert all('"save_seconds": ' in line and '"save_wait_seconds": ' in line for line in lines)
    for number in range(1, 6):
        mine, other = (sorted((tmp_path / out / f"iter_000000{number}").glob("rank*")) for out in argv)
        assert [path.read_bytes() for path in mine] == [path.read_bytes() for path in other] and len(mine) == 2
    log = (tmp_path / "background" / "train.log").read_text()
    assert log.count("is written while training goes on") == 4 and log.count("in the background") == 5
