"""The example scripts as a user runs them: through the environment, as one node of two ranks and as two nodes of one."""

import json
import os
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
    names = environment(MODEL="m", DATA="d", OUTPUT=tmp_path / "out", **variables)
    names["PATH"] = f"{tmp_path}{os.pathsep}{names['PATH']}"
    script = ["sh", str(tmp_path / "finetune_idefics2.sh")]
    done = subprocess.run(script, env=names, capture_output=True, text=True, timeout=30)
    assert said in done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda p: p.name)
def test_recipes_are_valid(path):
    """Every recipe resolves, with packing on, once data and a checkpoint are named."""
    from megatron_vlm.cli.train import resolve

    config, _ = resolve(["--config", str(path), "--load", "x", "--data-path", "y", "--save", "z", "--device", "cpu"])
    assert config.data.packing


@pytest.mark.parametrize(
    "path", sorted([*EXAMPLES.rglob("*.sh"), *(ROOT / "toolkits").glob("*.sh")]), ids=lambda p: p.name
)
def test_shell_syntax(path):
    subprocess.run(["sh", "-n", str(path)], check=True)
    subprocess.run(["bash", "-n", str(EXAMPLES / "slurm" / "train.sbatch")], check=True)
