"""One command: raw records in, and out what plain transformers and PEFT load. The original commands, their name changed."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_vlm.testing.runs import metrics_of
from megatron_vlm.weights.checkpoint_dir import TRACKER
from tests.examples.shell import EXAMPLES, environment, free_port
from tests.launch.conftest import write_records

QUESTION = "What digit is this?"
LORA = (
    "peft.r=4 peft.alpha=8 peft.target_modules=.*text_model.*(q|k|v|o)_proj peft.modules_to_save=[connector] "
    "--save_merged_model True"
)


def write_digits(folder: Path, count: int) -> Path:
    """The first ``count`` training scans of the quickstart, in LLaVA's format."""
    sys.path.insert(0, str(EXAMPLES / "quickstart"))
    try:
        from make_digits import picture, record
    finally:
        sys.path.pop(0)
    from sklearn.datasets import load_digits

    digits = load_digits()
    (folder / "scans").mkdir(parents=True)
    records = []
    for number in range(count):
        name = f"scans/{number}.png"
        picture(digits.images[number]).convert("RGB").save(folder / name)
        records.append(record(str(number), name, int(digits.target[number])))
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


def answers(model, processor, pictures: list[Image.Image]) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits of the prompts, and the greedy answers."""
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(text=[prompt] * len(pictures), images=[[p] for p in pictures], return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits
        new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return logits, new.tolist()


@pytest.mark.slow
def test_raw_records_to_an_adapter_and_a_merged_model(launch, model, tmp_path):
    from peft import PeftModel
    from transformers import AutoProcessor, Idefics2ForConditionalGeneration

    path, out = write_digits(tmp_path / "digits", 60), tmp_path / "out"
    code, output = launch(f"--train_json {path} --max_steps 10 --per_device_train_batch_size 8 {LORA}")
    assert code == 0, output
    assert "shards built in" in output and "60 samples" in output
    for name in (
        "config.yaml",
        "train.log",
        "loss.png",
        "training_log.txt",
        "trainer_state.json",
        "checkpoint-10/manifest.json",
        "tokenizer.json",
        "processor_config.json",
        "merged_model/config.json",
    ):
        assert (out / name).is_file(), name
    losses = [line["loss"] for line in metrics_of(out)]
    assert len(losses) == 10 and losses[-1] < losses[0]

    base = Idefics2ForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    pictures = [Image.open(path.parent / "scans" / f"{number}.png") for number in (3, 7, 11)]
    processor = AutoProcessor.from_pretrained(out / "merged_model")
    untrained = answers(base, processor, pictures)[0]
    adapted = PeftModel.from_pretrained(base, str(out)).eval()
    merged = Idefics2ForConditionalGeneration.from_pretrained(out / "merged_model", dtype=torch.float32).eval()
    (logits, texts), (expected, others) = answers(adapted, processor, pictures), answers(merged, processor, pictures)
    assert texts == others
    difference, largest = float((logits - expected).abs().max()), float(expected.abs().max())
    print(f"adapter against merged model: {difference:.1e} of {largest:.1f}")
    assert difference <= 2e-5 * largest
    assert float((untrained - expected).abs().max()) > 0.05 * largest  # the training is in it

    (out / TRACKER).unlink()  # as where a kill came between a run's first checkpoint and this file
    code, output = launch(f"--train_json {path} --max_steps 10 --per_device_train_batch_size 8 {LORA} --no-launch")
    assert code == 0 and "shards of an earlier start" in output and "goes on from the last one" in output, output


def run(folder: Path, *words: str, **variables: object) -> subprocess.CompletedProcess:
    """``megatron-vlm launch`` as a program, in ``folder``."""
    command = [sys.executable, "-m", "megatron_vlm", "launch", *(word for text in words for word in text.split())]
    return subprocess.run(
        command, cwd=folder, env=environment(**variables), capture_output=True, text=True, timeout=600, check=False
    )


def words_of(model: Path, folder: Path, out: str = "out") -> str:
    return (
        f"--load {model} --train_json {folder / 'train.json'} --max_length 96 --shortest-edge 24 --learning_rate 1e-3 "
        f"--output_dir {out} --shard_cache cache --make-vocab-size-divisible-by 8 data.num_workers=0 --logging_steps 1 "
        "--device cpu"
    )


@pytest.mark.full
def test_a_second_start_reuses_the_shards_and_goes_on(model, tmp_path):
    write_digits(tmp_path, 1437)
    texts = []
    for steps in (4, 6):
        done = run(tmp_path, words_of(model, tmp_path), f"--max_steps {steps} --export_each_epoch True")
        assert done.returncode == 0, done.stdout + done.stderr
        texts.append(done.stdout)
    assert "shards built in" in texts[0] and "shards of an earlier start" in texts[1]
    assert "4 iterations" in texts[0] and "2 iterations from 4" not in texts[1]
    assert len(metrics_of(tmp_path / "out")) == 6
    assert (tmp_path / "out" / "hf" / "model.safetensors").is_file()
    done = run(tmp_path, words_of(model, tmp_path), "--max_steps 3 --overwrite_output_dir True")
    assert done.returncode == 0 and len(metrics_of(tmp_path / "out")) == 3
    assert [path.name for path in (tmp_path / "out").glob("iter_*")] == ["iter_0000003"]


@pytest.mark.full
def test_each_epoch_is_exported(model, tmp_path):
    write_digits(tmp_path, 40)
    batch = "--per_device_train_batch_size 8 --num_train_epochs 3 --export_each_epoch True"
    done = run(tmp_path, words_of(model, tmp_path), batch)
    assert done.returncode == 0, done.stdout + done.stderr
    for epoch in (1, 2, 3):
        assert (tmp_path / "out" / f"epoch_{epoch}" / "hf" / "config.json").is_file(), done.stdout


@pytest.mark.full
def test_a_base_that_no_adapter_can_name(launch, model, tmp_path):
    """Assembled or converted weights: said before the start, and at the end what takes the adapter from the run works."""
    from megatron_vlm.cli.main import main

    assert main(["convert", "hf2mg", "--hf", str(model), "--out", str(tmp_path / "megatron")]) == 0
    path = write_records(tmp_path / "data", 8)
    lora = "peft.r=4 peft.target_modules=all-linear --max_steps 1 --per_device_train_batch_size 2"
    code, output = launch(f"--train_json {path} {lora}", source=tmp_path / "megatron")
    assert code == 0, output
    assert "is no Hugging Face directory" in output.split("plan\n")[0]
    promised = next(line for line in output.splitlines() if line.lstrip().startswith("output  "))
    assert "adapter_config.json" not in promised and "export failed" not in output
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    words = ["convert", "mg2hf", "--adapter-only", "--load", str(tmp_path / "out"), "--base", str(model)]
    assert main([*words, "--out", str(tmp_path / "adapter")]) == 0
    record = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == str(model)
    words = f"--train_json {path} {lora} --export_each_epoch True --output_dir {tmp_path / 'second'}"
    code, output = launch(words, source=tmp_path / "megatron")
    assert code == 1 and "FAILED   output" in output and not (tmp_path / "second").exists()


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.full), signal.SIGTERM])
def test_a_signal_saves_and_leaves_the_outputs(model, tmp_path, number):
    write_digits(tmp_path, 40)
    command = [sys.executable, "-m", "megatron_vlm", "launch"]
    command += f"{words_of(model, tmp_path)} --max_steps 100000 --num_processes 2 --master_port {free_port()}".split()
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=file, stderr=file)
        while "iteration 3/" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(120) == 143, log.read_text()
    steps = len(metrics_of(tmp_path / "out"))
    assert (tmp_path / "out" / f"iter_{steps:07d}" / "manifest.json").is_file()
    assert (tmp_path / "out" / "hf" / "model.safetensors").is_file() and (tmp_path / "out" / "loss.png").is_file()


@pytest.mark.full
def test_ranks_that_torchrun_started(model, tmp_path):
    write_records(tmp_path, 20)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    words = f"-m megatron_vlm launch {words_of(model, tmp_path)} --max_steps 3".split()
    done = subprocess.run(
        [*torchrun, *words], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on each of the 2 ranks that RANK tells of" in done.stdout and "on 2 x cpu" in done.stdout
    assert len(metrics_of(tmp_path / "out")) == 3 and (tmp_path / "out" / "hf" / "config.json").is_file()
    shutil.rmtree(tmp_path / "out")
    words[words.index("--max_steps") + 1] = "-3"
    done = subprocess.run(
        [*torchrun, *words], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode and not (tmp_path / "out").exists()  # rank 0's failed check ends every rank
