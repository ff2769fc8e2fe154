"""The bar on a real terminal (a pty), and its absence anywhere else."""

import io
import logging
import os
import sys
import threading
import time

from megatron_vlm.log import get_logger, setup_logging
from megatron_vlm.progress import Bar, WarmUp


def test_a_terminal_shows_rates_and_the_time_left(monkeypatch, tmp_path):
    master, slave = os.openpty()
    shown = bytearray()

    def read() -> None:
        try:
            while data := os.read(master, 4096):
                shown.extend(data)
        except OSError:
            return  # the other end is closed

    reader = threading.Thread(target=read)
    reader.start()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        setup_logging(rank=0, file=tmp_path / "train.log")
        stream = logging.getLogger("megatron_vlm").handlers[0].stream
        with Bar("training", 10, done=2) as bar:
            assert bar.visible
            bar.show(7, "loss 1.5 | 300 tokens/s")
            get_logger().info("saved iter_7")
            get_logger().info("iteration 7/10")
        assert logging.getLogger("megatron_vlm").handlers[0].stream is stream
        get_logger().info("iteration 8/10")
    reader.join(10)
    os.close(master)
    text = shown.decode()
    for word in ("training", "7/10", "loss 1.5 | 300 tokens/s", "saved iter_7", "iteration 7/10", "iteration 8/10"):
        assert word in text, text  # lines stay in the scrollback
    assert "iteration 7/10" in (tmp_path / "train.log").read_text()


def test_a_slow_first_step_says_why(monkeypatch, capsys):
    monkeypatch.setattr("megatron_vlm.progress._SLOW_SECONDS", 0.01)
    setup_logging(rank=0)
    for seconds in (0.1, 0.1):
        warm_up = WarmUp()
        for _ in range(2):
            with warm_up:
                time.sleep(seconds)
    assert capsys.readouterr().out.count("the first step warms up") == 2
    monkeypatch.setattr("megatron_vlm.progress._SLOW_SECONDS", 60)
    with WarmUp():
        pass
    assert "warms up" not in capsys.readouterr().out


def test_elsewhere_there_are_lines_alone():
    file = io.StringIO()
    with Bar("training", 10, file=file) as bar:
        bar.show(7, "loss")
        assert not bar.visible
    assert file.getvalue() == ""
