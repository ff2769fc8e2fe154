"""A family is one folder and one line of the registry: a generated copy of one is launched with adapters, and exported."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.testing.runs import write_shards
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2

PACKAGE = Path(__file__).parents[2] / "megatron_vlm"


def copy_family(package: Path, name: str) -> None:
    """Copies the family ``idefics2`` of a copied package under another name."""
    (registry,) = package.rglob("registry.py")
    text = registry.read_text()
    line = next(line for line in text.splitlines() if '"idefics2":' in line)
    module = line.split('"')[3].split(":")[0]
    folder = package.parent / module.replace(".", "/")
    shutil.copytree(folder, folder.with_name(name))
    for path in folder.with_name(name).rglob("*.py"):
        own = path.read_text().replace(module, module.replace("idefics2", name))
        path.write_text(own.replace('"idefics2"', f'"{name}"').replace("'idefics2'", f"'{name}'"))
    registry.write_text(text.replace(line, f"{line}\n{line.replace('idefics2', name)}"))


@pytest.mark.full
def test_a_copied_family_is_launched_with_adapters(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "megatron_vlm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PACKAGE.parent / "examples", tmp_path / "examples")
    copy_family(tmp_path / "megatron_vlm", "copied")
    write_tiny_idefics2(tmp_path / "model", layers=1)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "copied"}))
    shards = write_shards(tmp_path / "data", 8, seed=1)
    words = (
        f"launch --model-name-or-path {tmp_path / 'model'} --train-json {shards} --output-dir {tmp_path / 'out'} --use_lora True "
        "--device cpu --bf16 False --max_steps 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 "
        "--max_length 256 --report_to none"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "megatron_vlm", *words.split()]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "INFO copied on 1 x cpu" in done.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file(), done.stdout
