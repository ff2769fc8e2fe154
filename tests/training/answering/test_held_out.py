"""`evaluate`: answers equal to `generate`'s, scores equal to a computation by hand, and a run that broke off goes on."""

import json

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.errors import ConfigError
from megatron_vlm.testing.distributed import RankError, run_distributed
from megatron_vlm.training.answering import held_out as answering
from megatron_vlm.training.answering.generate import GenerateConfig, run_generate
from megatron_vlm.training.answering.held_out import ScoreConfig, run_evaluate


@pytest.fixture
def held_out(tmp_path):
    """Three pictures of noise with questions; right answers are put in by ``write``."""
    draws = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(draws.integers(0, 255, (30, 20, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")

    def write(*answers):
        records = [
            {"id": f"r{i}", "image": f"{i}.png", "kind": "ab"[i % 2], "answers": list(right)}
            | {"conversations": [{"from": "human", "value": f"<image>\nWhat {i}?"}, {"from": "gpt", "value": right[0]}]}
            for i, right in enumerate(answers)
        ]
        (tmp_path / "val.json").write_text(json.dumps(records))
        return str(tmp_path / "val.json")

    return write


def evaluate_and_warn(config):
    """On a rank: what ``run_evaluate`` returns, and what it warned of."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answering.log, "warning", lambda text, *values: said.append(text % values))
        return run_evaluate(config), "\n".join(said)


def test_scores_by_hand_and_a_run_that_goes_on(twin, held_out, tmp_path):
    shared = {"load": str(twin), "image_root": str(tmp_path), "device": "cpu", "sampling": {"max_new_tokens": 4}}
    shared["input"] = [held_out(["x"], ["x"], ["x"])]
    config = GenerateConfig.from_dict(shared | {"out": str(tmp_path / "generated.jsonl")})
    run_distributed(run_generate, config, dp=2)
    said = [json.loads(line)["answer"] for line in (tmp_path / "generated.jsonl").read_text().splitlines()]
    assert len(set(said)) > 1
    held_out([said[0]], ["wrong", said[1] + "."], ["wrong"])
    out = tmp_path / "scores"
    settings = {"out": str(out), "metrics": ["exact_match", "cer"], "subset_key": "kind"}
    config = ScoreConfig.from_dict(shared | settings | {"baselines": ["blind", "majority"]})
    found = run_distributed(run_evaluate, config, dp=2)
    assert found[0] == found[1]
    lines = (out / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == said
    assert json.loads(lines[1])["references"] == ["wrong", said[1] + "."]
    assert json.loads((out / "scores.json").read_text()) == found[0]
    scores = found[0]["scores"]
    assert scores["model"]["all"]["exact_match"]["value"] == pytest.approx(2 / 3)
    assert scores["model"]["a"]["exact_match"]["value"] == 0.5 and scores["model"]["b"]["exact_match"]["number"] == 1
    assert scores["majority"]["all"]["exact_match"]["value"] == pytest.approx(2 / 3)  # wrong, of two
    blind = [json.loads(line)["answer"] for line in (out / "blind.jsonl").read_text().splitlines()]
    assert len(blind) == 3 and blind != said
    page = (out / "mistakes.html").read_text()
    assert "1 of 3 answers are not fully right by exact_match" in page and "What 2?" in page and "What 0?" not in page

    kept = json.loads(lines[0]) | {"answer": "kept"}  # what is there is not answered again; a line cut short is
    (out / "answers.jsonl").write_text(json.dumps(kept) + "\n" + lines[1][:20])
    ((again, warned),) = run_distributed(evaluate_and_warn, config)
    assert "1 answers are to other questions, or were cut off" in warned
    texts = [json.loads(line)["answer"] for line in (out / "answers.jsonl").read_text().splitlines()]
    assert texts == ["kept", *said[1:]]
    assert again["scores"]["model"]["all"]["exact_match"]["value"] == pytest.approx(1 / 3)
    val = tmp_path / "val.json"
    val.write_text(val.read_text().replace("What 1?", "What now?"))  # and the third picture is another
    val.write_text(val.read_text().replace("2.png", "1.png"))
    run_distributed(run_evaluate, config)
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert lines[0]["answer"] == "kept" and lines[1]["prompt"] == "<image>\nWhat now?"
    assert lines[1]["answer"] != said[1] and lines[2]["answer"] != said[2]
    other = config.replace(sampling=config.sampling.replace(max_new_tokens=5))
    with pytest.raises(RankError, match=r"holds answers of another sampling .*name another folder"):
        run_distributed(run_evaluate, other)
    held_out()
    with pytest.raises(RankError, match="there is no record"):
        run_distributed(run_evaluate, config.replace(out=tmp_path / "none"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "nothing is asked"),
        ({"input": ["a"], "metrics": ["accuracy"]}, "unknown metric 'accuracy'"),
        ({"input": ["a"], "mistakes": -1}, "--mistakes must not be negative"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ConfigError, match=words):
        ScoreConfig.from_dict({"load": "x", "out": "y", **settings})
