"""docs/guides/qwen2_5_vl.md, Videos: MP4 files of digits on a tiny twin; the answer about one is transformers' own."""

import json
import subprocess
import sys

import pytest
import torch

from megatron_vlm.data.config import DataConfig
from megatron_vlm.models.families.qwen2_5_vl.processor import Qwen25VLProcessor
from megatron_vlm.testing.runs import metrics_of
from megatron_vlm.testing.twins.qwen2_5_vl import inputs_of, write_tiny_qwen2_5_vl
from megatron_vlm.training.answering.prompts import Prompt, encode_prompt
from tests.examples.shell import EXAMPLES, environment

SETTINGS = (
    "training.train_epochs=null", "training.train_iters=30", "training.precision=fp32", "data.num_workers=1",
    "data.seq_length=1024", "data.max_pixels=6000", "optimizer.lr=3e-3", "checkpoint.save_interval=null",
)  # fmt: skip
QUESTION = "Which digits are shown, in order?"


@pytest.mark.full
def test_videos_are_learned_and_asked_about(tmp_path):
    write_tiny_qwen2_5_vl(tmp_path / "model", std=0.05)

    def run(*words, **variables):
        program = [sys.executable, "-m", "megatron_vlm"] if words[0] in ("data", "generate", "convert") else []
        shared = dict(capture_output=True, text=True, timeout=900, env=environment(**variables))
        done = subprocess.run([*program, *map(str, words)], **shared)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    made, clips, out, page = tmp_path / "made", tmp_path / "clips", tmp_path / "run", tmp_path / "page.html"
    run(sys.executable, EXAMPLES / "long_rows" / "make_data.py", "--out", made, "--videos", "8")
    source = ("--format", "llava", "--input", made / "videos.json", "--image-root", made)
    run("data", "build", *source, "--video-sampling", "pairs", "--out", clips)
    run("data", "preview", clips, "--model", tmp_path / "model", "--out", page)
    assert "2 frames of" in page.read_text()
    names = dict(MODEL=tmp_path / "model", DATA=clips, OUTPUT=out, DEVICE="cpu", GPUS=1, TP=1, BATCH_SIZE=1)
    run("sh", EXAMPLES / "qwen2_5_vl" / "finetune_qwen2_5_vl.sh", *SETTINGS, **names)
    lines = metrics_of(out)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    run("convert", "mg2hf", "--load", out, "--out", tmp_path / "hf")
    # The same question by a record and by a path; transformers' own model goes on in the same way.
    asking = ("--load", tmp_path / "hf", "--device", "cpu", "--max-new-tokens", "8")
    asked = json.loads(run("generate", *asking, *source, "--limit", "1"))
    video = made / "videos" / "0.mp4"
    said = run("generate", *asking, "--prompt", QUESTION, "--image", video).strip()
    assert said == asked["answer"].strip()
    from transformers import Qwen2_5_VLForConditionalGeneration

    trained = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    processor = Qwen25VLProcessor.from_pretrained(tmp_path / "hf", DataConfig(seq_length=1024))
    sample = encode_prompt(processor, Prompt(text=QUESTION, images=(str(video),)))
    inputs = inputs_of(trained.config.to_dict())(sample)
    del inputs["position_ids"]
    frames, seconds = 8, 4.8  # of the file: 48 frames, 10 a second
    with torch.no_grad():
        ids = trained.generate(
            **inputs, second_per_grid_ts=torch.tensor([2 / (frames / seconds)]), max_new_tokens=8, do_sample=False,
            eos_token_id=list(processor.stop_ids), pad_token_id=0,
        )[0, len(sample.input_ids) :].tolist()  # fmt: skip
    assert processor.decode(ids) == said
