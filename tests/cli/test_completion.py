"""Completion: the words that a shell is given, and a real bash and zsh that ask for them."""

import os
import shutil
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


def test_the_script_is_the_same_in_both_shells(capsys):
    scripts = [run([shell]) or capsys.readouterr().out for shell in ("bash", "zsh")]
    # To zsh `:1:COMP_CWORD` without the dollar is a modifier C.
    assert scripts[1].endswith(scripts[0]) and "${COMP_WORDS[@]:1:$COMP_CWORD}" in scripts[0]


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


@pytest.mark.full
def test_zsh_completes_as_one_types(tmp_path):
    import pexpect

    assert shutil.which("zsh"), "install zsh: apt-get install zsh"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "TERM": "dumb", "ZDOTDIR": str(tmp_path), "PS1": "> "}
    shell = pexpect.spawn("zsh", ["-f", "-i"], env=variables, timeout=60, encoding="utf-8", dimensions=(40, 150))
    try:
        shell.sendline('eval "$(megatron-vlm completion zsh)"; echo rea""dy')
        shell.expect("ready\r\n")
        for typed, rest in (
            ("data pre", "data preview"),
            ("recipe show internvl3/lora_i", "internvl3/lora_internvl3"),
            ("data preview --samp", "--samples"),
            ("train /dev/nul", "train /dev/null"),
        ):
            shell.send(f"megatron-vlm {typed}\t")
            shell.expect(rest)
            shell.send("\x15")
    finally:
        shell.close(force=True)
