"""The example scripts as a user runs them: through the environment, as one node of two ranks and as two nodes of one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.shell import EXAMPLES, ROOT, environment, free_port, start


def run(script: str, *arguments: str, nodes: int = 1, **variables: object) -> str:
    """Runs a script on two ranks, as one node or as two on localhost, and returns the output of the first node."""
    port = free_port()
    processes = [
        start(
            script,
            *arguments,
            DEVICE="cpu",
            MASTER_PORT=port,
            **variables,
            **(
                dict(GPUS=2)
                if nodes == 1
                else dict(GPUS_PER_NODE=1, NNODES=2, NODE_RANK=rank, MASTER_ADDR="127.0.0.1", TP=2)
            ),
        )
        for rank in range(nodes)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output[-6000:]
        assert "iteration 1/" in output or script.startswith("eval"), output[-3000:]  # on every node
    return outputs[0]


def metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder) if "loss" in line]


def both_stages(folder: Path, nodes: int, llm: Path, vision: Path, data: Path) -> list[float]:
    """Pre-trains from parts and fine-tunes; returns all losses."""
    shared = dict(DATA=data / "shards", VAL_DATA=data / "shards")
    parts = dict(LLM=llm, VISION=vision, PER_DEVICE_BATCH_SIZE=2, BATCH_SIZE=4)
    run("pretrain_idefics2_llama3.sh", nodes=nodes, OUTPUT=folder / "one", **parts, **shared)
    more = dict(MODEL=folder / "one", BATCH_SIZE=1)
    run("finetune_idefics2_llama3.sh", "training.train_epochs=3", nodes=nodes, OUTPUT=folder / "two", **more, **shared)
    return losses(folder / "one") + losses(folder / "two")


@pytest.mark.slow
def test_pretraining_from_parts(tmp_path, llm, vision, data):
    """LLM + tower -> stage 1, on one node of two ranks."""
    shared = dict(DATA=data / "shards", VAL_DATA=data / "shards", PER_DEVICE_BATCH_SIZE=2, BATCH_SIZE=4)
    run("pretrain_idefics2_llama3.sh", OUTPUT=tmp_path / "one", LLM=llm, VISION=vision, **shared)
    assert len(losses(tmp_path / "one")) == 3  # 12 samples by fours
    assert (tmp_path / "one" / "latest_checkpointed_iteration.txt").exists()


@pytest.mark.full
def test_pretrain_finetune_export_inference(tmp_path, llm, vision, data, val_data):
    """LLM + tower -> stage 1 -> stage 2 -> mg2hf -> plain transformers; two nodes give the losses of one."""
    one = both_stages(tmp_path / "one_node", 1, llm, vision, data)
    assert len(one) == 6  # 12 samples by fours, then three epochs of one packed row
    two = both_stages(tmp_path / "two_nodes", 2, llm, vision, data)
    assert one == two

    export = tmp_path / "export"
    stage_two = tmp_path / "one_node" / "two"
    convert = [
        str(ROOT / "toolkits" / "convert"),
        "mg2hf",
        "--load",
        str(stage_two),
        "--out",
        str(export),
        "--dtype",
        "fp32",
    ]
    done = subprocess.run(convert, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr

    image = next((val_data / "images").glob("*.png"))
    inference = [sys.executable, str(EXAMPLES / "inference_hf.py"), "--model", str(export), "--device", "cpu"]
    question = ["--image", str(image), "--question", "What is it?", "--max-new-tokens", "4"]
    done = subprocess.run([*inference, *question], env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr

    run(
        "eval_idefics2.sh",
        "training.precision=fp32",
        MODEL=export,
        VAL_DATA=val_data / "shards",
        OUTPUT=tmp_path / "eval",
    )
    (ours,) = [line["eval_loss"] for line in metrics(tmp_path / "eval") if "eval_loss" in line]
    records = ["--json", str(val_data / "records.json"), "--image-root", str(val_data / "images"), "--answer-loss-only"]
    done = subprocess.run([*inference, *records], env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    theirs = float(done.stdout.split()[1])
    assert abs(ours - theirs) <= 1e-5 * theirs, (ours, theirs)


@pytest.mark.parametrize(
    ("script", "variables", "missing"),
    [
        ("pretrain_idefics2_llama3.sh", {}, "LLM"),
        ("pretrain_idefics2_llama3.sh", {"LLM": "x"}, "VISION"),
        ("pretrain_idefics2_llama3.sh", {"LLM": "x", "VISION": "y", "OUTPUT": "z"}, "DATA"),
        ("finetune_idefics2_llama3.sh", {"DATA": "x", "OUTPUT": "z"}, "MODEL"),
        ("finetune_idefics2.sh", {"MODEL": "x", "DATA": "x"}, "OUTPUT"),
        ("finetune_idefics2.sh", {"MODEL": "x", "DATA": "x", "OUTPUT": "z", "GPUS": "0"}, "GPUS"),
        ("eval_idefics2.sh", {"MODEL": "x", "OUTPUT": "z"}, "VAL_DATA"),
    ],
)
def test_a_missing_variable_is_named(script, variables, missing):
    process = start(script, **variables)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 1
    assert f"{missing} is not set" in output


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"GPUS": 8, "BATCH_SIZE": 64}, "data parallel ranks: 2, accumulation: 32"),
        ({"GPUS": 8, "BATCH_SIZE": 64, "PER_DEVICE_BATCH_SIZE": 4, "NNODES": 2}, "ranks: 4, accumulation: 4"),
        ({"GPUS": 6, "BATCH_SIZE": 64}, "BATCH_SIZE 64 is not a multiple of 3"),
        ({"GPUS": 2, "TP": 4}, "1 x 2 ranks do not divide into TP 4 x PP 1"),
    ],
)
def test_accumulation_is_derived(variables, said, tmp_path):
    """torchrun is replaced by a script that does nothing: only the arithmetic is looked at."""
    (tmp_path / "torchrun").write_text("#!/bin/sh\n")
    (tmp_path / "torchrun").chmod(0o755)
    (tmp_path / "common.sh").write_text((EXAMPLES / "common.sh").read_text().replace('PATH="$ROOT', 'UNUSED="$ROOT'))
    (tmp_path / "finetune_idefics2.sh").write_text((EXAMPLES / "finetune_idefics2.sh").read_text())
    names = environment(MODEL="m", DATA="d", OUTPUT=tmp_path / "out", TORCHRUN="torchrun", **variables)
    names["PATH"] = f"{tmp_path}{os.pathsep}{names['PATH']}"
    script = ["sh", str(tmp_path / "finetune_idefics2.sh")]
    done = subprocess.run(script, env=names, capture_output=True, text=True, timeout=30)
    assert said in done.stdout + done.stderr


RECIPES = sorted(path.relative_to(EXAMPLES).with_suffix("").as_posix() for path in EXAMPLES.rglob("*.yaml"))
BATCHES = {
    "finetune_idefics2": 128, "finetune_idefics2_llama3": 128, "pretrain_idefics2_llama3": 256, "lora_idefics2": 16,
    "qlora_idefics2": 16, "internlm2/finetune_internlm2": 16, "internlm2/qlora_internlm2": 16,
    "internvl3/finetune_internvl3": 128, "internvl3/lora_internvl3": 32, "internvl3/qlora_internvl3": 32,
    "smolvlm/finetune_smolvlm": 16, "smolvlm/lora_smolvlm": 16, "smolvlm/qlora_smolvlm": 16, "smolvlm/quickstart_smolvlm": 2,
    "smolvlm/video_smolvlm": 16,
    "internvl3/finetune_internvl3_5": 512, "internvl3/pretrain_internvl3": 512,
    "gemma3/finetune_gemma3": 32, "gemma3/lora_gemma3": 16, "gemma3/qlora_gemma3": 16,
    "llava_next/finetune_llava_next": 128, "llava_next/lora_llava_next": 128, "llava_next/qlora_llava_next": 128,
    "qwen2_5_vl/finetune_qwen2_5_vl": 32, "qwen2_5_vl/lora_qwen2_5_vl": 16, "qwen2_5_vl/qlora_qwen2_5_vl": 16,
    "qwen3_vl/finetune_qwen3_vl": 32, "qwen3_vl/lora_qwen3_vl": 16, "qwen3_vl/qlora_qwen3_vl": 16,
    "llava_internlm2/pretrain_llava_internlm2": 256, "llava_internlm2/finetune_llava_internlm2": 128,
    "llava_internlm2/qlora_llava_internlm2": 128, "xcomposer2/finetune_xcomposer2": 64, "xcomposer2/lora_xcomposer2": 64,
    "xcomposer2/finetune_xcomposer2_4khd": 64, "xcomposer2/lora_xcomposer2_4khd": 64, "quickstart/train": 1,
    "quickstart/lora": 1, "long_rows/documents_idefics2": 8, "long_rows/video_idefics2": 16,
}  # fmt: skip
"""Samples or packed rows of an update, as published."""


def words_of(script: str, folder: Path, *arguments: str, **variables: object) -> list[str]:
    """What a script has torchrun start: the words after `megatron_vlm train`."""
    shutil.copytree(EXAMPLES, folder / "examples")  # where no environment of the checkout comes first
    (folder / "megatron_vlm").symlink_to(ROOT / "megatron_vlm")
    (folder / "torchrun").write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > '{folder}/words'\n")
    (folder / "torchrun").chmod(0o755)
    names = environment(
        **{
            "MODEL": "m",
            "DATA": "d",
            "OUTPUT": folder / "out",
            "TORCHRUN": "torchrun",
            "GPUS": 1,
            "DEVICE": "cpu",
            **variables,
        }
    )
    names["PATH"] = f"{folder}{os.pathsep}{names['PATH']}"
    done = subprocess.run(
        ["sh", str(folder / "examples" / script), *arguments], env=names, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    words = (folder / "words").read_text().splitlines()
    return words[words.index("train") + 1 :]


def what_trains(config) -> dict:
    """A resolved run without its paths, its device and its layout."""
    plain = config.to_dict()
    for section in ("parallel", "checkpoint", "logging"):
        plain.pop(section)
    for section, names in (("data", ("train", "valid")), ("training", ("device",))):
        for name in names:
            plain[section].pop(name)
    return plain


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_same_run_through_every_door(name, tmp_path):
    """`train --config`, `launch --config` and the script of the recipe: the same batch, rows and settings."""
    from megatron_vlm import registry
    from megatron_vlm.options import recipes
    from megatron_vlm.options.request import read_request
    from megatron_vlm.options.resolve import resolve
    from megatron_vlm.training.run_config import RunConfig

    paths = ["--load", "x", "--data-path", "y", "--save", "z", "--device", "cpu"]
    config, _ = resolve(["--config", name, *paths])
    assert config.training.global_batch_size == BATCHES[name]
    settings = [("checkpoint.load", "x"), ("data.train", ["y"]), ("checkpoint.save", "z"), ("training.device", "cpu")]
    request = read_request(recipes.load_config(name), settings, command="launch")
    launched = RunConfig.from_dict(request.complete({}, registry.get("idefics2"), 1).run)
    assert what_trains(launched) == what_trains(config)
    if "quickstart" not in name:
        scripted, _ = resolve(words_of(f"{name}.sh", tmp_path, CP=1))
        assert what_trains(scripted) == what_trains(config)


def test_the_batch_of_a_script_can_be_said(tmp_path):
    from megatron_vlm.options.resolve import resolve

    script = "internvl3/finetune_internvl3.sh"
    packed, _ = resolve(words_of(script, tmp_path / "a", PER_DEVICE_BATCH_SIZE=1, BATCH_SIZE=8))
    assert (packed.data.packing, packed.data.group_by, packed.training.micro_batch_size) == (True, None, 1)
    assert packed.training.global_batch_size == 8
    two, _ = resolve(words_of("finetune_idefics2.sh", tmp_path / "b", PER_DEVICE_BATCH_SIZE=2))
    assert (two.data.packing, two.training.micro_batch_size, two.training.global_batch_size) == (False, 2, 128)
    rows, _ = resolve(words_of("xcomposer2/lora_xcomposer2.sh", tmp_path / "c", PACKING=1))
    assert rows.data.packing and rows.training.global_batch_size == 64


def test_paths_of_a_script_are_expanded(tmp_path):
    """One reading of `~`, of variables and of names that YAML takes for something else."""
    from megatron_vlm.options.resolve import resolve

    out = tmp_path / "home" / "out"
    (out / "iter_0000001").mkdir(parents=True)  # the tracker is written after it: a kill may have come between
    words = words_of(
        "finetune_idefics2.sh",
        tmp_path / "run",
        HOME=tmp_path / "home",
        DISK="/disk",
        DATA="007,/a: b #c,~/d,$DISK/e",
        OUTPUT="~/out",
    )
    previous = {name: os.environ.get(name) for name in ("HOME", "DISK")}
    os.environ |= {"HOME": str(tmp_path / "home"), "DISK": "/disk"}
    try:
        config, _ = resolve(words)
    finally:
        os.environ |= {name: value for name, value in previous.items() if value is not None}
        os.environ.pop("DISK")
    assert config.data.train == ("007", "/a: b #c", str(tmp_path / "home" / "d"), "/disk/e")
    assert config.checkpoint.save == config.checkpoint.load == str(out)  # it goes on from what lies there


@pytest.mark.parametrize(
    "path", sorted([*EXAMPLES.rglob("*.sh"), *(ROOT / "toolkits").glob("*.sh")]), ids=lambda p: p.name
)
def test_shell_syntax(path):
    subprocess.run(["sh", "-n", str(path)], check=True)
    subprocess.run(["bash", "-n", str(EXAMPLES / "slurm" / "train.sbatch")], check=True)
