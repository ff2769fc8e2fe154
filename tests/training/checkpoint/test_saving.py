"""A checkpoint that cannot be written: tried again, then the run stops or goes on, and the last good one stays as it is."""

import resource
from pathlib import Path

import pytest

from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.runs import metrics_of, train


def train_on_a_full_disk(argv: list[str], refused: list[int], folder: str) -> tuple[int, str, str]:
    """Trains; the tries of a save whose numbers are ``refused`` find that rank 0's files may not grow.

    Returns:
        exit code, error, and the log.
    """
    import os

    from megatron_vlm.training.checkpoint import save as checkpoint

    real, tries = checkpoint.RankFile.write, []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write(*args, **kwargs):
        tries.append(1)
        full = len(tries) in refused and os.environ["RANK"] == "0"
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if full else limits[0], limits[1]))
        try:
            return real(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    checkpoint.RankFile.write = write
    try:
        code, error = train(argv)
    finally:
        checkpoint.RankFile.write = real
    return code, error, Path(folder, "train.log").read_text()


@pytest.fixture
def run(command, tmp_path):
    def make(out: str, refused: list[int], more: str):
        argv = command(out, f"--save {tmp_path / out} --save-interval 2 checkpoint.save_retry_seconds=0.01 {more}")
        answers = run_distributed(train_on_a_full_disk, argv, refused, str(tmp_path / out), dp=2)
        assert answers[0][0] == answers[1][0]
        return answers[0], sorted(path.name for path in (tmp_path / out).glob("iter_*"))

    return make


def test_a_failed_save_is_tried_again(run, tmp_path):
    (code, error, log), folders = run("out", [2, 3], "--train-iters 4")
    assert (code, error) == (0, "") and folders == ["iter_0000002", "iter_0000004"]
    assert log.count("a save failed, 2 more tries, the next in 0.01 s") == log.count("a save failed, 1 more tries") == 1
    assert "rank0.safetensors" in log and "File too large" in log


def test_after_the_last_try_the_run_stops_or_goes_on_as_told(run, tmp_path):
    (code, error, _), folders = run("stop", [2, 3], "--train-iters 6 checkpoint.save_retries=1")
    assert code == 1 and error.startswith("CheckpointError: saving iteration 4 to") and folders == ["iter_0000002"]
    assert (tmp_path / "stop" / "latest_checkpointed_iteration.txt").read_text() == "2\n"
    more = "--train-iters 6 checkpoint.save_retries=1 checkpoint.on_save_failure=continue"
    (code, error, log), folders = run("on", [2, 3], more)
    assert (code, error) == (0, "") and folders == ["iter_0000002", "iter_0000006"]
    assert "a save failed and is given up; the run goes on" in log
    assert [line["iteration"] for line in metrics_of(tmp_path / "on")] == list(range(1, 7))
    (code, error, _), folders = run("last", [2, 3], more.replace("iters 6", "iters 4"))
    assert code == 1 and "saving iteration 4" in error and folders == ["iter_0000002"]  # nothing comes after it
