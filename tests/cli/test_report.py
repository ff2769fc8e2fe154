"""`megatron-vlm report` as a user runs it."""

import os
import signal
import threading

import pytest

from megatron_vlm.cli.main import main
from tests.training.metrics.test_run_files import write_run


def test_a_page_of_two_runs(tmp_path, capsys):
    folders = [str(write_run(tmp_path / name)) for name in ("one", "two")]
    assert main(["report", *folders]) == 0
    assert "two, held out" in (tmp_path / "one" / "report.html").read_text()
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'one' / 'report.html'}: 0.")


def test_live_renews_the_page_until_ctrl_c(tmp_path):
    run, out = write_run(tmp_path / "run"), tmp_path / "page.html"

    def grow() -> None:
        before = out.read_text() if out.exists() else ""
        if not before:
            threading.Timer(0.05, grow).start()
            return
        write_run(run, steps=80)
        threading.Timer(1.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    threading.Timer(0.05, grow).start()
    assert main(["report", str(run), "--out", str(out), "--live", "1"]) == 0
    assert "80 of 80" in out.read_text() and 'http-equiv="refresh" content="1"' in out.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["none"], "holds no metrics.jsonl"), (["run", "--out", "run/metrics.jsonl"], "name a .html file"),
     (["run", "--live", "0"], "--live must be at least 1"), (["run", "--out", "no/a.html"], "in a folder that exists")],
)  # fmt: skip
def test_mistakes(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "none").mkdir()
    assert main(["report", *words]) == 1
    assert message in capsys.readouterr().err
