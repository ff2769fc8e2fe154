"""A run that saves to a URL: the files of one that saves to a folder, gone on with from there, exported from there."""

import json
import os
from pathlib import Path

import pytest

from megatron_vlm.cli.main import main
from megatron_vlm.errors import ConfigError
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.runs import metrics_of, train
from megatron_vlm.training.checkpoint.config import CheckpointConfig
from tests.weights.store import BUCKET, s3_store


def train_with(argv: list[str], environment: dict[str, str]) -> tuple[int, str]:
    os.environ.update(environment)
    return train(argv)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("rank*"))}


def test_saved_to_s3_in_the_background_and_gone_on_with_elsewhere(command, tmp_path, monkeypatch):
    url, whole = f"s3://{BUCKET}/run", tmp_path / "whole"
    more = f"--save {url} --async-save --keep-last 2 --save-interval 1"
    with s3_store() as environment:
        environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
        words = command("whole", f"--save {whole} --train-iters 4")
        assert run_distributed(train_with, words, environment) == [(0, "")]
        first = command("first", more, f"checkpoint.staging={tmp_path / 'one'} --train-iters 2 --lr-decay-iters 4")
        assert run_distributed(train_with, first, environment) == [(0, "")]
        assert [path.name for path in sorted((tmp_path / "one").glob("iter_*"))] == ["iter_0000002"]
        again = command("first", more, f"checkpoint.staging={tmp_path / 'two'} --train-iters 4", load=url)
        assert run_distributed(train_with, again, environment) == [(0, "")]  # on another host
        assert files_of(tmp_path / "two" / "iter_0000004") == files_of(whole / "iter_0000004") != {}
        assert metrics_of(tmp_path / "first") == metrics_of(whole)
        other = command("other", more, f"checkpoint.staging={tmp_path / 'three'} --train-iters 4")
        code, error = run_distributed(train_with, other, environment)[0]
        assert code == 1 and "holds checkpoints of another run (iterations 3, 4)" in error
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert main(["convert", "mg2hf", "--load", url, "--out", str(tmp_path / "hf")]) == 0
        assert (tmp_path / "hf" / "config.json").exists()


@pytest.mark.full
def test_the_best_stays_in_the_store(command, valid_data, tmp_path):
    """As in a folder, gone on with on another host."""
    url, plain = f"file://{tmp_path / 'store'}", tmp_path / "plain"
    more = f"--train-iters 5 --save-interval 1 --keep-last 2 --keep-best loss data.valid=[{valid_data}]"
    assert run_distributed(train, command("plain", f"--save {plain} {more}")) == [(0, "")]
    first = command(
        "first", f"--save {url} {more} --train-iters 3 --lr-decay-iters 5 checkpoint.staging={tmp_path / 'a'}"
    )
    again = command("again", f"--save {url} {more} --async-save checkpoint.staging={tmp_path / 'b'}", load=url)
    for words in (first, again):
        assert run_distributed(train, words) == [(0, "")]
    best = json.loads((plain / "best.json").read_text())
    assert json.loads((tmp_path / "store" / "best.json").read_text()) == best
    assert {p.name for p in plain.glob("iter_*")} == {p.name for p in (tmp_path / "store").glob("iter_*")}
    assert f"iter_000000{best['best']}" in {p.name for p in plain.glob("iter_*")}


def test_settings():
    one, other = (CheckpointConfig(save=f"s3://b/{name}/run/").folder for name in "xy")
    assert one != other and one.parent == Path("runs") and one.name.startswith("run-")  # never another run's folder
    assert CheckpointConfig(save="s3://b/x/run").folder == one
    config = CheckpointConfig(save="s3://b/run", staging="here")
    assert (config.url, config.folder) == ("s3://b/run", Path("here"))
    assert (CheckpointConfig(save="d").url, CheckpointConfig(save="d").folder) == (None, Path("d"))
    for fields, message in (
        ({"save": "d", "staging": "e"}, "checkpoint.staging has no effect"),
        ({"save": "s3://b/run", "staging": "s3://c"}, "is a URL: name a folder"),
        ({"save": "memory://x", "async_save": True}, "another process cannot write"),
    ):
        with pytest.raises(ConfigError, match=message):
            CheckpointConfig(**fields)
