"""`megatron-vlm report` as a user runs it."""

import json
import shutil
import time

import pytest

from megatron_vlm.cli.main import main
from tests.data.formats.make import write_pictures
from tests.training.metrics.test_run_files import EVIL, write_run


def test_a_page_of_two_runs(tmp_path, capsys):
    folders = [str(write_run(tmp_path / name)) for name in ("one", "two")]
    assert main(["report", *folders]) == 0
    assert "two, held out" in (tmp_path / "one" / "report.html").read_text()
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'one' / 'report.html'}: 0.")


def test_live_renews_the_page_until_ctrl_c(tmp_path, monkeypatch):
    run, out, waits = write_run(tmp_path / "run"), tmp_path / "page.html", []

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            raise KeyboardInterrupt
        assert "80 of 80" not in out.read_text()
        write_run(run, steps=80)

    monkeypatch.setattr(time, "sleep", wait)
    assert main(["report", str(run), "--out", str(out), "--live", "1"]) == 0
    assert waits == [1, 1]
    assert "80 of 80" in out.read_text() and 'http-equiv="refresh" content="1"' in out.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["none"], "none holds no metrics.jsonl"), (["absent"], "absent holds no metrics.jsonl"),
     (["run", "--out", "run/metrics.jsonl"], "name a .html file"),
     (["run", "--live", "0"], "--live must be at least 1"), (["run", "--out", "no/a.html"], "in a folder that exists")],
)  # fmt: skip
def test_mistakes(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "none").mkdir()
    assert main(["report", *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.full
def test_pages_in_chromium(tmp_path):
    """Of a report and of a preview, with hostile names and texts: no script runs, no error, no request; buttons choose cards."""
    from playwright.sync_api import sync_playwright

    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert browser_path, "install chromium: apt-get install chromium"
    assert main(["report", str(write_run(tmp_path / "run")), "--out", str(tmp_path / "report.html")]) == 0
    write_pictures(tmp_path, 2)
    talk = [{"from": "human", "value": EVIL}, {"from": "gpt", "value": EVIL}]
    shown = [{"from": "human", "value": f"<image>{EVIL}"}, {"from": "gpt", "value": EVIL}]
    records = [{"id": EVIL, "conversations": talk}, *({"image": f"{n}.png", "conversations": shown} for n in range(2))]
    (tmp_path / "raw.json").write_text(json.dumps(records))
    assert main(["data", "preview", str(tmp_path / "raw.json"), "--out", str(tmp_path / "preview.html")]) == 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for name in ("report", "preview"):
            page, told = browser.new_page(), []
            page.on("console", lambda message, told=told: told.append(message.text))
            page.on("pageerror", lambda error, told=told: told.append(str(error)))
            page.on("dialog", lambda dialog, told=told: (told.append(dialog.message), dialog.dismiss()))
            page.on("request", lambda request, told=told: told.append(request.url))
            page.goto(f"file://{tmp_path}/{name}.html")
            asked = [text for text in told if not text.startswith("data:image/png")]
            assert asked == [f"file://{tmp_path}/{name}.html"], asked
            assert EVIL in page.inner_text("body")
        cards = page.locator(".card:visible")
        assert cards.count() == 3
        page.check("#only-pictured")
        assert cards.count() == 2
        page.check("#only-textonly")
        assert cards.count() == 1
        browser.close()
