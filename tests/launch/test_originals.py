"""The original programs' whole commands, their program's name changed, on tiny twins: trained, and left where the guide says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.testing.runs import metrics_of
from megatron_vlm.testing.twins.internlm2 import write_tiny_internlm2
from megatron_vlm.testing.twins.internvl3 import write_chat_layout, write_tiny_internvl3
from megatron_vlm.testing.twins.llava_internlm2 import write_tiny_llava_internlm2
from megatron_vlm.testing.twins.xcomposer2 import write_tiny_xcomposer2
from tests.examples.shell import environment, free_port
from tests.launch.commands import FINETUNE, FINETUNE_LORA, FT_EVERY_OPTION, INTERNVL3
from tests.launch.conftest import write_records

SMALL = "--device cpu data.num_workers=1 --shard_cache cache --make-vocab-size-divisible-by 8"
LAUNCH = [sys.executable, "-m", "megatron_vlm", "launch"]
RAN = ["train.log", "config.yaml", "metrics.jsonl", "loss.png"]


def execute(folder: Path, words: str, *more: str, start: list[str] = LAUNCH, **replaced: object) -> str:
    """Runs a command in ``folder`` with words replaced (as a user names own files) and returns its output."""
    argv = [str(replaced.get(word, word)) for word in words.split()]
    argv += [word for text in more for word in text.split()]
    done = subprocess.run(
        [*start, *argv], cwd=folder, env=environment(), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    return done.stdout


def xcomposer(folder: Path, variant: str, records: int) -> Path:
    """A twin, FT.py's json of conversations without a placeholder, and finetune.sh's list of them."""
    (folder / "model").mkdir()
    write_tiny_xcomposer2(folder / "model", variant, std=0.05, max_position_embeddings=16384)
    path = write_records(folder, records)
    made = json.loads(path.read_text())
    for record in made:
        record["image"] = [str(folder / record["image"])]
        for turn in record["conversations"]:
            turn["from"] = turn["from"].replace("gpt", "assistant")
            turn["value"] = turn["value"].replace("<image>", "")
    path.write_text(json.dumps(made))
    (folder / "val.json").write_text(json.dumps(made[:4]))
    (folder / "data.txt").write_text(f"train.json {records / 1000}\n")
    return folder / "model"


def assert_left(folder: Path, *names: str, steps: int) -> None:
    """The published learning rates move a twin little in so few steps: what counts is that it ran, and what it left."""
    losses = [line["loss"] for line in metrics_of(folder)]
    assert len(losses) == steps and len(set(losses)) == steps and all(0 < loss < 10 for loss in losses), losses
    for name in (*RAN, *names):
        assert (folder / name).is_file(), (name, sorted(path.name for path in folder.iterdir()))


ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json")


@pytest.mark.full
def test_finetune_lora_sh(tmp_path):
    model = xcomposer(tmp_path, "7b", 80)
    names = {"internlm/internlm-xcomposer2-vl-7b": model, "490": 28}
    output = execute(tmp_path, FINETUNE_LORA, SMALL, **names)
    assert_left(tmp_path / "output" / "finetune", *ADAPTER, steps=10)
    assert "1 samples x 8 microbatches x dp 1" in output


@pytest.mark.full
def test_finetune_sh(tmp_path):
    model = xcomposer(tmp_path, "4khd-7b", 160)
    execute(tmp_path, FINETUNE, SMALL, **{"internlm/internlm-xcomposer2-4khd-7b": model})
    out = tmp_path / "output" / "finetune"
    assert_left(out, "hf/config.json", "hf/model.safetensors", steps=10)


@pytest.mark.full
def test_ft_py_with_its_defaults(tmp_path):
    model = xcomposer(tmp_path, "4khd-7b", 80)
    output = execute(tmp_path, f"--model_name_or_path {model} --train_json train.json --val_json val.json", SMALL)
    assert_left(tmp_path / "runs" / "train", "hf/config.json", "hf/model.safetensors", steps=10)
    assert "recipe xcomposer2/finetune_xcomposer2_4khd" in output and "eval_loss" in output


@pytest.mark.full
def test_ft_py_with_every_option(tmp_path):
    model = xcomposer(tmp_path, "4khd-7b", 80)
    words = FT_EVERY_OPTION.replace("--no_launch", "")
    execute(tmp_path, words, SMALL, M=model)
    work = tmp_path / "work"
    assert_left(work, *ADAPTER, "merged_model/config.json", "merged_model/model.safetensors", steps=10)
    assert (work / "iter_0000005").is_dir() and len(metrics_of(work, evaluations=True)) == 3  # steps 4, 8 and the last


@pytest.mark.full
def test_internvl3_under_torchrun(tmp_path):
    write_chat_layout(
        tmp_path / "model",
        write_tiny_internvl3(tmp_path / "native", std=0.05, text=dict(max_position_embeddings=16384)),
    )
    records = json.loads(write_records(tmp_path / "images", 64).read_text())
    (tmp_path / "images" / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    entry = {
        "root": "images",
        "annotation": "images/train.jsonl",
        "data_augment": False,
        "repeat_time": 5,
        "length": 64,
    }
    (tmp_path / "meta.json").write_text(json.dumps({"colours": entry}))
    (tmp_path / "zero1.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc_per_node=2"]
    torchrun += [f"--master_port={free_port()}", "-m", "megatron_vlm", "launch"]
    names = {"OpenGVLab/InternVL3-8B": tmp_path / "model", "448": 32, "ZERO1": "zero1.json"}
    output = execute(tmp_path, INTERNVL3, SMALL, "--save_merged_model", start=torchrun, **names)
    assert_left(tmp_path / "work_dirs" / "x", *ADAPTER, "merged_model/config.json", steps=10)
    assert "4 samples x 4 microbatches x dp 2 = 32 samples" in output
    adapter = json.loads((tmp_path / "work_dirs" / "x" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (16, 32, 0.05)


@pytest.mark.full
def test_xtuners_recipes(tmp_path):
    """XTuner's config values, as the packaged recipes: text and LLaVA, both on a base in 4 bits."""
    (tmp_path / "text").mkdir()
    write_tiny_internlm2(tmp_path / "text", std=0.05, max_position_embeddings=2048)
    turns = [{"role": "user", "content": "who are you?"}, {"role": "assistant", "content": "a small model"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(600)))
    words = "--config internlm2/qlora_internlm2 --model_name_or_path text --train_json train.jsonl --output_dir out"
    output = execute(tmp_path, words, SMALL, "--max_steps 10 --logging_steps 1")
    assert_left(tmp_path / "out", *ADAPTER, steps=10)
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (64, 16, 0.1)
    assert "NF4" in output

    (tmp_path / "llava").mkdir()
    write_tiny_llava_internlm2(tmp_path / "llava", std=0.05)
    write_records(tmp_path / "pictures", 160)
    words = "--config llava_internlm2/qlora_llava_internlm2 --model_name_or_path llava --train_json pictures/train.json"
    execute(tmp_path, words, SMALL, "--output_dir both --max_steps 10 --max_length 1024 --logging_steps 1")
    assert_left(tmp_path / "both", steps=10)


def test_originals_pass_their_checks(tmp_path, monkeypatch, capfd):
    """Without a process of the run: the whole way up to its start."""
    from megatron_vlm.cli.main import main

    monkeypatch.chdir(tmp_path)
    model = xcomposer(tmp_path, "7b", 8)
    words = FINETUNE_LORA.replace("internlm/internlm-xcomposer2-vl-7b", str(model)).replace("490", "28")
    code = main(["launch", *words.split(), *SMALL.split(), "--no-launch"])
    output = capfd.readouterr().out
    assert code == 0, output
    assert "8 sound records" in output and "adapter_config.json" in output and "1 epochs" in output
