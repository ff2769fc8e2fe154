"""Completion: the words that a shell is given, and a real bash that asks for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.cli.completion import run, words
from megatron_vlm.errors import ConfigError


@pytest.mark.parametrize(
    ("typed", "some", "others"),
    [
        ([""], ["launch", "recipe"], ["--lr"]),
        (["tr"], ["train"], ["launch"]),
        (["data", ""], ["build", "preview"], ["launch"]),
        (["data", "preview", "--s"], ["--samples", "--seq-length"], ["--out", "build"]),
        (["convert", "h"], ["hf2mg"], ["verify"]),
        (["train", "--load", "x", "--micro"], ["--micro-batch-size"], ["--lr"]),
        (["recipe", "show", "internvl3/"], ["internvl3/lora_internvl3"], ["lora_idefics2"]),
        (["launch", "--config", "lora_i"], ["lora_idefics2"], []),
    ],
)
def test_words(typed, some, others):
    found = words(typed)
    assert set(some) <= set(found) and not set(others) & set(found), found


def test_another_shell_is_refused():
    with pytest.raises(ConfigError, match="name a shell"):
        run(["fish"])


@pytest.mark.full
def test_bash_completes(tmp_path):
    program = Path(sys.executable).parent / "megatron-vlm"
    script = (
        f'eval "$({program} completion bash)"; COMP_WORDS=(megatron-vlm data pre); COMP_CWORD=2; _megatron_vlm; '
        'echo "${COMPREPLY[@]}"; complete -p megatron-vlm'
    )
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.stdout.splitlines()[0] == "preview" and "-F _megatron_vlm" in done.stdout, done.stdout + done.stderr
