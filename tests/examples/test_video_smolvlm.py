"""docs/guides/smolvlm.md, Videos: MP4 files of digits through the recipe of video on a tiny twin, and the questions after it."""

import json
import subprocess
import sys

import pytest

from megatron_vlm.testing.runs import metrics_of
from megatron_vlm.testing.twins.smolvlm import write_tiny_smolvlm
from tests.examples.shell import EXAMPLES, environment

SETTINGS = (
    "training.train_epochs=null", "training.train_iters=40", "training.precision=fp32", "data.num_workers=1", "optimizer.lr=3e-3",
    "optimizer.lr_warmup_iters=5", "checkpoint.save_interval=null",
)  # fmt: skip


@pytest.mark.full
def test_videos_are_learned_and_asked_about(tmp_path):
    write_tiny_smolvlm(tmp_path / "model", std=0.05, text=dict(max_position_embeddings=8192))

    def run(*words, **variables):
        program = [sys.executable, "-m", "megatron_vlm"] if words[0] in ("data", "generate", "chat", "evaluate") else []
        shared = dict(capture_output=True, text=True, timeout=900, env=environment(**variables))
        done = subprocess.run([*program, *map(str, words)], **shared, input="And now?\nEXIT\n")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    made, clips, out = tmp_path / "made", tmp_path / "clips", tmp_path / "run"
    run(sys.executable, EXAMPLES / "long_rows" / "make_data.py", "--out", made, "--videos", "8")
    records, video = made / "videos.json", made / "videos" / "0.mp4"
    source = ("--format", "llava", "--input", records, "--image-root", made)
    run("data", "build", *source, "--video-sampling", "ends", "--out", clips)
    run("data", "check", clips, "--model", tmp_path / "model")
    page = tmp_path / "page.html"
    run("data", "preview", clips, "--model", tmp_path / "model", "--out", page)
    assert "series of five frames from a 0:00:04 [H:MM:SS] video" in page.read_text()
    names = dict(MODEL=tmp_path / "model", DATA=clips, OUTPUT=out, DEVICE="cpu", GPUS=1, BATCH_SIZE=1)
    run("sh", EXAMPLES / "smolvlm" / "video_smolvlm.sh", *SETTINGS, **names)
    lines = metrics_of(out)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"] and lines[0]["images"] == 8 * 5  # all clips in one row
    # The same question by a record, by a path, in a conversation and scored.
    asking = ("--load", out, "--device", "cpu", "--max-new-tokens", "8")
    asked = json.loads(run("generate", *asking, *source, "--limit", "1"))
    question = "Which digits are shown, in order?"
    said = run("generate", *asking, "--prompt", f"<video>\n{question}", "--image", video)
    assert said.strip() == asked["answer"].strip()
    talk = run("chat", out, "--device", "cpu", "--max-new-tokens", "8", "--image", video)
    assert talk.strip()
    scores = tmp_path / "scores"
    run("evaluate", *asking, "--input", records, "--image-root", made, "--limit", "2", "--out", scores)
