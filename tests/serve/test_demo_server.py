"""The demo's server: who may call, what may be uploaded; and in Chromium the whole page with two real models."""

import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from megatron_vlm.cli.main import main
from megatron_vlm.errors import ConfigError
from megatron_vlm.serve.demo_server import DemoServer
from tests.serve.oracle import NEW, hf_answer

ROOT = Path(__file__).parents[2]


def png(side=8):
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return file.getvalue()


def test_what_is_refused(serve):
    demo, call = serve()
    call("GET", "/")
    session = {"X-Session": next(iter(demo.sessions))}
    for body in (b"a text, not a picture", b"<svg></svg>", b""):
        status, answer, _ = call("POST", "/upload", body, {"X-Name": "a%3Cb%3E.png", **session})
        assert status == 400 and b"a<b>.png is" in answer, answer
    status, answer, _ = call("POST", "/upload", length=50 << 20)
    assert status == 413 and b"52428800 bytes, the limit is 1048576" in answer
    assert call("POST", "/ask", b"{}", {"X-Demo": "0"})[0] == 403  # another site's page cannot send it
    assert call("GET", "/", headers={"Host": "evil.example:80"})[0] == 403  # nor call itself this machine
    for host, status in (
        ("localhost:80", 200),
        ("[::1]:80", 200),
        ("[::1]", 200),
        ("[::1", 403),
        ("[", 403),
        ("", 403),
    ):
        assert call("GET", "/", headers={"Host": host})[0] == status, host
    for site, kind, status in (
        ("cross-site", "image", 403),
        ("same-site", "iframe", 403),
        ("cross-site", "document", 200),
    ):
        assert call("GET", "/", headers={"Sec-Fetch-Site": site, "Sec-Fetch-Dest": kind})[0] == status, kind
    name = next(iter(demo.sessions))
    for wrong in ({"images": 5}, {"sampling": [1]}):
        status, answer, _ = call("POST", "/ask", json.dumps({"session": name, "text": "a", **wrong}).encode())
        assert status == 400 and b"images are a list" in answer, answer
    assert call("POST", "/ask", b"[" * 9000)[0] == 400
    assert call("GET", "//[")[0] == 404
    assert call("GET", "/picture/..%2fx")[0] == call("GET", "/x")[0] == call("POST", "/x", b"{}")[0] == 404
    assert call("POST", "/ask", b"[]")[0] == call("POST", "/ask", b"{")[0] == 400
    assert not demo.sessions[session["X-Session"]].pictures


def test_malformed_requests_leave_the_terminal_alone(serve, capfd, caplog):
    demo, call = serve()
    call("GET", "/")
    name, port = next(iter(demo.sessions)), demo.port
    host = b"Host: localhost\r\nX-Demo: 1\r\n"
    ask = json.dumps({"session": name, "text": "a"}).encode()
    post = b"POST /ask HTTP/1.1\r\n" + host + b"Content-Length: "
    for raw in (
        b"\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"BREW / HTTP/1.1\r\n" + host + b"\r\n",
        b"GET /\xff\x00 HTTP/1.1\r\n" + host + b"\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        post + b"9" * 5000 + b"\r\n\r\n",
        post + b"100\r\n\r\n{",
        post + b"-1\r\n\r\n",
        post + b"2\r\n\r\n\xff\xfe",
        post + b"%d\r\n\r\n" % len(ask) + ask,
    ):
        with socket.create_connection(("127.0.0.1", port)) as caller:  # leaves before it has read, with a reset
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            caller.sendall(raw)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as caller:
            caller.sendall(raw)
            caller.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: caller.recv(1 << 16), b""))
            assert not answer or b"HTTP/1." in answer or b"<!DOCTYPE" in answer[:200], (raw, answer)
    demo.ask = lambda request: 1 / 0  # a fault of ours is a line
    call("POST", "/reset", json.dumps({"session": name}).encode())
    with pytest.raises(http.client.RemoteDisconnected):
        call("POST", "/ask", ask)
    said = capfd.readouterr()
    assert "Traceback" not in said.err + said.out, said.err
    assert [record.getMessage() for record in caplog.records] == [
        "a request failed: ZeroDivisionError: division by zero"
    ]


def test_loading_pages_ends_no_conversation(serve, monkeypatch):
    demo, call = serve()
    monkeypatch.setattr("megatron_vlm.serve.demo._MOST_SESSIONS", 2)
    call("GET", "/")
    (talk,) = demo.sessions
    question = json.dumps({"session": talk, "text": "a"}).encode()
    assert call("POST", "/ask", question)[0] == 200
    for _ in range(5):
        call("GET", "/")
    assert len(demo.sessions) == 3 and call("POST", "/ask", question)[0] == 200
    for name in [name for name in demo.sessions if name != talk]:
        assert call("POST", "/reset", json.dumps({"session": name}).encode())[0] == 200
    assert talk not in demo.sessions and len(demo.sessions) == 2  # of those in use the oldest goes


def test_a_token_opens_the_page_and_a_cookie_keeps_it_open(serve):
    demo, call = serve("secret-word")
    assert call("GET", "/")[0] == call("GET", "/?token=other")[0] == call("POST", "/upload", png())[0] == 403
    status, _, headers = call("GET", "/?token=secret-word", headers={"Host": "gpu-node:80"})
    assert status == 200 and "HttpOnly; SameSite=Strict" in headers["Set-Cookie"]
    cookie = headers["Set-Cookie"].split(";")[0]
    assert cookie.startswith("token_") and cookie.endswith("=secret-word")  # a demo at another port has another
    assert call("POST", "/upload", png(), {"Cookie": cookie, "X-Session": next(iter(demo.sessions))})[0] == 200
    assert call("GET", "/", headers={"Cookie": cookie.replace("secret", "other")})[0] == 403


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "99999"], "cannot serve --host 127.0.0.1 --port 99999: .*0-65535"),
        (["--port", "PORT"], "cannot serve --host 127.0.0.1 --port .*: Address already in use"),
        (["--host", "no.such.host.invalid"], "cannot serve --host no.such.host.invalid"),
        (["--port", "0", "--examples", "none.json"], "none.json"),
        (["--token", "wörterbuch"], "--token is at least 8 letters"),
        (["--max-upload-mb", "65"], "at most 64"),
    ],
)
def test_what_is_wrong_is_said_before_models_load(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.setattr("megatron_vlm.serve.demo_server.Engine", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [str(taken.getsockname()[1]) if word == "PORT" else word for word in words]
        assert main(["demo", str(tmp_path), *words]) == 1
    assert re.search(said, capsys.readouterr().err)


def test_the_other_address_of_this_machine():
    try:
        with DemoServer("::1", 0) as server:
            assert server.address == f"http://[::1]:{server.server_address[1]}"
    except ConfigError as error:  # a machine without it
        assert "cannot serve --host ::1 --port 0" in str(error)


@pytest.mark.full
def test_the_page_in_chromium(twins, picture, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert browser_path, "install chromium: apt-get install chromium"
    turns = [{"from": "human", "value": "How many cats?"}, {"from": "gpt", "value": "two"}]
    (tmp_path / "val.json").write_text(json.dumps([{"conversations": turns}]))
    (tmp_path / "fake.png").write_text("a text")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(50 << 20)
    command = [sys.executable, "-m", "megatron_vlm", "demo", str(twins[1]), "--compare", str(twins[0]), "--port", "0"]
    command += ["--device", "cpu", "--max-new-tokens", str(NEW), "--examples", str(tmp_path / "val.json")]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        assert server.stdout.readline().startswith("loading ")
        address = server.stdout.readline().split()[1]
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
            page = browser.new_page()
            said, asked = [], []
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto(address)

            def answers(number):
                expect(page.locator(".answer[data-done]")).to_have_count(number, timeout=60_000)
                found = page.locator(".answer[data-done]").all()
                return [turn.evaluate("e => e.firstChild.textContent") for turn in found]

            for name, words in (("fake.png", "fake.png is"), ("large.png", "has 52428800 bytes, the limit is")):
                page.set_input_files("#file", tmp_path / name)
                expect(page.locator("#status")).to_contain_text(words, timeout=60_000)
            refused, said[:] = list(said), []  # Chromium notes the server's 400
            page.set_input_files("#file", picture)
            page.wait_for_selector("#attached img")
            page.fill("#text", "What digit is this?")
            page.click("#send")
            first = ("user", "<image>\nWhat digit is this?")
            # Control characters and half characters that noise of a tiny model makes are text here too.
            assert answers(2) == [hf_answer(twin, [first], picture) for twin in twins]
            page.screenshot(path=tmp_path / "demo.png")
            page.click("#reset")
            page.click(".example")
            page.press("#text", "Enter")
            assert answers(2) == [hf_answer(twin, [("user", "How many cats?")]) for twin in twins]
            assert not said and len(refused) <= 1, (said, refused)
            assert all(url.startswith(address.rstrip("/")) for url in asked)
            browser.close()
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
