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
        (tmp_path / name).parent.mkdir(exist_ok=True)
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


def test_no_python_is_named(checkout):
    shutil.rmtree(checkout / ".venv")
    tools = checkout / "tools"
    tools.mkdir()
    for tool in ("sh", "cat", "cksum", "sed"):
        (tools / tool).symlink_to(shutil.which(tool))
    code, _, output = source(checkout, PATH=str(tools))
    assert code == 1
    assert "no Python 3.11 or 3.12" in output
