"""A newcomer's path: the wheel in an empty environment, a recipe copied, checked and launched, outside the repository."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_vlm.testing.runs import metrics_of
from tests.examples.shell import ROOT, environment
from tests.launch.test_launch import write_digits


def call(*words: object, cwd: Path, **variables: object) -> str:
    done = subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.full
def test_wheel_recipe_copy_and_launch(model, tmp_path):
    source, home = tmp_path / "source", tmp_path / "home"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "build")
    for name in ("megatron_vlm", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip")
    call(*pip, "wheel", ".", "--no-deps", "--no-index", "--no-build-isolation", "-q", "-w", tmp_path, cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.rmtree(source)

    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "wheels.pth").write_text(sysconfig.get_path("purelib") + "\n")  # what pip would download: the same versions
    call(*pip, "--python", python, "install", "--no-deps", "--no-index", "-q", wheel, cwd=tmp_path)

    data = write_digits(home / "data", 60)
    program = tmp_path / "env" / "bin" / "megatron-vlm"
    where = call(python, "-c", "import megatron_vlm; print(megatron_vlm.__file__)", cwd=home)
    assert where.startswith(str(tmp_path / "env"))
    assert "lora_idefics2" in call(program, "recipe", "list", "-p", "idefics2", cwd=home)
    call(program, "recipe", "copy", "quickstart/train", "mine", cwd=home)
    recipe = next((home / "mine").rglob("*.yaml"))
    words = f"launch --config {recipe} --model_name_or_path {model} --train_json {data} --output_dir out --shard_cache cache"
    words += " --max_steps 5 optimizer.lr_warmup_iters=1 data.seq_length=96 --shortest-edge 24 --make-vocab-size-divisible-by 8"
    assert "all checks passed" in call(program, *words.split(), "--no-launch", cwd=home)
    assert not (home / "out").exists()
    call(program, *words.split(), cwd=home)
    assert len(metrics_of(home / "out")) == 5
    assert (home / "out" / "hf" / "model.safetensors").is_file() and (home / "out" / "loss.png").is_file()
