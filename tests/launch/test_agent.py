"""torchrun's end, without its frames: one line after a signal, one after a rank that failed."""

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vlm.log import get_logger, setup_logging
from tests.examples.shell import environment, free_port

RANK = """
import os, pathlib, signal, sys, time
rank, out = os.environ["RANK"], pathlib.Path(sys.argv[1])
def save(*_):
    time.sleep(0.3)
    (out / f"saved{rank}").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
(out / f"ready{rank}").touch()
if sys.argv[2] == "fail" and rank == "1":
    sys.exit("the message of rank 1")
time.sleep(60)
"""


def start(folder: Path, what: str) -> subprocess.Popen:
    (folder / "rank.py").write_text(RANK)
    words = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command = [sys.executable, "-m", "megatron_vlm.launch.agent", *words, str(folder / "rank.py"), str(folder), what]
    names = environment(PYTHONPATH=Path(__file__).parents[2])
    del names["PYTHONWARNINGS"]
    return subprocess.Popen(
        command, env=names, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_in_one_line_after_every_rank_has_saved(tmp_path, number):
    process = start(tmp_path, "wait")
    deadline = time.monotonic() + 90
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143, output
    assert output.splitlines() == ["stopped by SIGTERM: all ranks of this node have ended"]
    assert all((tmp_path / f"saved{rank}").exists() for rank in (0, 1))


def test_a_rank_that_fails_is_named_once(tmp_path):
    process = start(tmp_path, "fail")
    output = process.communicate(timeout=90)[0]
    assert process.returncode == 1
    assert output.splitlines() == [
        "the message of rank 1",
        "rank 1 ended with exit code 1 and the others with it: its output above says why",
    ]


@pytest.mark.parametrize(
    ("rank", "local", "level"), [(0, 0, logging.INFO), (8, 0, logging.INFO), (9, 1, logging.WARNING)]
)
def test_the_first_rank_of_every_node_speaks(rank, local, level, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", str(local))
    try:
        setup_logging(rank)
        assert get_logger().level == level
    finally:
        setup_logging(0)
