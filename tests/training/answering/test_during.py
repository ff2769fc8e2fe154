"""A run that scores a held-out file while it trains, and keeps its best checkpoint."""

import json

import pytest
import yaml

from megatron_vlm.errors import ConfigError
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.runs import metrics_of, train
from megatron_vlm.training.answering.held_out import ScoreConfig, run_evaluate
from megatron_vlm.training.answering.prompts import EvaluateConfig


def test_scores_in_the_metrics_and_the_best_checkpoint_stays(twin, command, valid_data, tmp_path):
    questions = ("How many cats?", "What colour?", "Who?")
    records = [
        {"id": i, "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "two cats"}]}
        for i, text in enumerate(questions)
    ]
    (tmp_path / "val.json").write_text(json.dumps(records))
    settings = [f"evaluate.file=[{tmp_path / 'val.json'}]", "evaluate.metrics=[cer]", "evaluate.max_new_tokens=4"]
    run = command("run", f"--save {tmp_path / 'run'} --train-iters 5 --save-interval 1 --keep-last 2 --keep-best cer")
    assert run_distributed(train, [*run, *settings], dp=2) == [(0, "")] * 2
    scores = {m["iteration"]: m["eval_cer"] for m in metrics_of(tmp_path / "run") if "eval_cer" in m}
    assert sorted(scores) == [0, 1, 2, 3, 4, 5]
    config = {"load": str(twin), "input": [str(tmp_path / "val.json")], "out": str(tmp_path / "scores")}
    config |= {"metrics": ["cer"], "sampling": {"max_new_tokens": 4}, "device": "cpu"}
    (found,) = run_distributed(run_evaluate, ScoreConfig.from_dict(config))
    assert scores[0] == pytest.approx(found["scores"]["model"]["all"]["cer"]["value"])
    best = min(range(1, 6), key=scores.__getitem__)
    there = {path.name for path in (tmp_path / "run").glob("iter_*")}
    assert there == {f"iter_000000{i}" for i in {4, 5, best}}
    assert json.loads((tmp_path / "run" / "best.json").read_text())["best"] == best
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["checkpoint"]["keep_best"] == "cer"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metrics": ["anls"]}, r"evaluate\.metrics has no effect without evaluate\.file"),
        ({"limit": 3}, r"evaluate\.limit has no effect without evaluate\.file"),
        ({"file": ["a"], "metrics": ["anl"]}, "unknown metric 'anl'"),
        ({"file": ["a"], "limit": 0}, r"evaluate\.limit must be at least 1"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ConfigError, match=words):
        EvaluateConfig.from_dict(settings)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--train-iters 2 --save {} --keep-best loss",
            "checkpoint.keep_best loss is not evaluated: it may be nothing here",
        ),
        ("--train-iters 2 --save {} --keep-best anls --eval-file a.json", "it may be exact_match"),
        (
            "--train-iters 2 --keep-best exact_match --eval-file a.json",
            "checkpoint.keep_best is exact_match, but checkpoint.save is not set",
        ),
    ],
)
def test_a_best_that_nobody_measures(command, tmp_path, words, said):
    ((code, error),) = run_distributed(train, command("run", words.format(tmp_path / "run")))
    assert code == 1 and said in error
