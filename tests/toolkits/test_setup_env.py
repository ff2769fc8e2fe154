"""The environment script: what it asks pip for, when it does so again, and what it says when it cannot.

The interpreter of the environment is replaced by a script that writes down its arguments, so nothing is installed.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH = re.search(r'"(torch==[^"]+)"', (ROOT / "setup.py").read_text()).group(1)
RECORDER = """#!/bin/sh
case "$*" in
-) cat >/dev/null; [ -e cuda ] || { echo "a CPU build" >&2; exit 1; } ;;
*+cpu*) echo "$*" >>calls; [ -e cpu_wheels ] ;;
*) echo "$*" >>calls ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout with a recording interpreter in place of its environment's."""
    for name in ("setup.py", "toolkits/setup_env.sh", "toolkits/constraints.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text(RECORDER)
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    return tmp_path


def source(checkout, **variables):
    """Sources the script; returns (exit code, pip's calls, output)."""
    (checkout / "calls").write_text("")
    env = {"PATH": os.environ["PATH"], **variables}
    command = ["sh", "-ec", ". toolkits/setup_env.sh; command -v python; echo threads $OMP_NUM_THREADS"]
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, (checkout / "calls").read_text().splitlines(), done.stdout + done.stderr


def test_made_once_and_again_when_setup_changes(checkout):
    (checkout / "cpu_wheels").touch()
    code, calls, output = source(checkout)
    assert code == 0
    assert [call.split()[-1] for call in calls] == [f"{TORCH}+cpu", ".[dev]"]
    assert all("-c toolkits/constraints.txt" in call for call in calls)
    assert str(checkout / ".venv/bin/python") in output and "threads 1" in output
    assert source(checkout)[1] == []
    (checkout / "setup.py").write_text((checkout / "setup.py").read_text() + "# changed\n")
    assert len(source(checkout)[1]) == 2


def test_plain_torch_where_no_cpu_build_is_served(checkout):
    code, calls, _ = source(checkout)
    assert code == 0
    assert [call.split()[-1] for call in calls] == [f"{TORCH}+cpu", TORCH, ".[dev]"]


def test_the_build_of_torch_is_chosen_by_variables(checkout):
    (checkout / "cuda").touch()
    code, calls, _ = source(
        checkout, MEGATRON_VLM_TORCH="cuda", MEGATRON_VLM_PIP_ARGS="--pre", MEGATRON_VLM_EXTRAS="gpu"
    )
    assert code == 0
    assert [call.split()[-1] for call in calls] == [TORCH, ".[gpu]"]
    assert all("--pre" in call for call in calls)
    code, calls, _ = source(checkout, MEGATRON_VLM_TORCH=f"{TORCH}+cu130")
    assert calls[0].split()[-1] == f"{TORCH}+cu130"


def test_a_cpu_build_is_not_taken_for_a_cuda_one(checkout):
    code, _, output = source(checkout, MEGATRON_VLM_TORCH="cuda")
    assert code == 1
    assert "the environment could not be made" in output
    assert not (checkout / ".venv" / ".megatron_vlm").exists()


def run(checkout, *options, **variables):
    """Runs the script itself, from another folder; returns (exit code, pip's calls, output)."""
    (checkout / "calls").write_text("")
    env = {"PATH": os.environ["PATH"], **variables}
    words = ["sh", str(checkout / "toolkits" / "setup_env.sh"), *map(str, options)]
    done = subprocess.run(words, cwd=checkout.parent, env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, (checkout / "calls").read_text().splitlines(), done.stdout + done.stderr


def test_run_with_options(checkout, tmp_path):
    (checkout / "cuda").touch()
    prefix, cache = tmp_path / "elsewhere", tmp_path / "cache"
    shutil.move(checkout / ".venv", prefix)
    (prefix / "bin" / "activate").write_text("# of venv\n")
    for _ in range(2):
        code, calls, output = run(checkout, "--prefix", prefix, f"--cache={cache}", "--cuda")
        assert code == 0 and f"ready; activate it with:  . {prefix}/bin/activate" in output
    assert calls == [] and (cache / "pip").is_dir()
    code, calls, _ = run(checkout, "--prefix", prefix)
    assert [call.split()[-1] for call in calls] == [f"{TORCH}+cpu", TORCH, ".[dev]"], "another build is made anew"
    exports = (prefix / "bin" / "activate").read_text().splitlines()[1:]
    assert exports == [f'export HF_HOME="{cache}/huggingface" PIP_CACHE_DIR="{cache}/pip"']
    assert not (checkout / ".venv").exists()


def test_a_wrong_option_is_named(checkout):
    code, calls, output = run(checkout, "--gpu")
    assert code == 1 and not calls and "unknown option --gpu; known: --prefix DIR" in output
    code, _, output = run(checkout, "--prefix")
    assert code == 1 and "--prefix needs a folder" in output
    code, _, output = run(checkout, "--help")
    assert code == 0 and "--cache DIR" in output


def test_sourced_it_leaves_the_callers_arguments_alone(checkout):
    (checkout / "cpu_wheels").touch()
    command = ["sh", "-ec", ". toolkits/setup_env.sh; echo kept $*", "sh", "--prefix"]
    env = {"PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "kept --prefix" in done.stdout


def test_no_python_is_named(checkout):
    shutil.rmtree(checkout / ".venv")
    tools = checkout / "tools"
    tools.mkdir()
    for tool in ("sh", "cat", "cksum", "sed"):
        (tools / tool).symlink_to(shutil.which(tool))
    code, _, output = source(checkout, PATH=str(tools))
    assert code == 1
    assert "no Python 3.11 or 3.12" in output
