"""The demo's server: who may call, what may be uploaded; and in Chromium the whole page with two real models."""

import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from megatron_vlm.cli.main import main
from megatron_vlm.errors import ConfigError
from megatron_vlm.serve.demo import Demo, DemoServer, curves, held_out
from tests.serve.oracle import NEW, hf_answer

ROOT = Path(__file__).parents[2]
HOSTILE = "<img src=x onerror=alert(1)>"


class Echo:
    """Stands for the ranks: says what it was asked."""

    def send(self, request):
        self.request = request

    def events(self):
        for ask in self.request["asks"]:
            if "bad" in ask["turns"][-1][1]:
                raise ConfigError("it is bad")
            yield {"model": ask["model"], "text": "you said: "}
            yield {"model": ask["model"], "done": {"text": f"you said: {ask['turns'][-1][1]}"}}


@pytest.fixture
def serve(tmp_path):
    """``serve(token) -> (demo, call)``; ``call(method, path, body, headers) -> (status, body, headers)``."""
    servers = []

    def start(token=None):
        sampling = {"temperature": 0.0, "max_new_tokens": 8}
        names = ["base", HOSTILE]
        demo = Demo(names, system=None, sampling=sampling, folder=tmp_path, most_bytes=1 << 20, token=token)
        server = DemoServer("127.0.0.1", 0)
        demo.engine, server.demo = Echo(), demo
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)

        def call(method, path, body=None, headers=(), length=None):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
            connection.putrequest(method, path, skip_host="Host" in dict(headers))
            for name, value in {"X-Demo": "1", **dict(headers)}.items():
                connection.putheader(name, value)
            if body is not None or length:
                connection.putheader("Content-Length", str(length or len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.read(), dict(answer.getheaders())

        return demo, call

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def png(side=8):
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return file.getvalue()


def test_a_talk_over_http(serve):
    demo, call = serve()
    status, page, headers = call("GET", "/")
    (session,) = demo.sessions
    assert status == 200 and session.encode() in page and HOSTILE.encode() not in page
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    status, answer, _ = call("POST", "/upload", png(), {"X-Session": session})
    number = json.loads(answer)["id"]
    assert status == 200 and call("GET", f"/picture/{session}/{number}")[1] == png()
    call("GET", "/")
    other = list(demo.sessions)[-1]  # another page sees it neither by its name nor through the model
    assert call("GET", f"/picture/{other}/{number}")[0] == call("GET", f"/picture//{number}")[0] == 404
    stolen = json.dumps({"session": other, "text": "What?", "images": [number]}).encode()
    assert b"no longer here" in call("POST", "/ask", stolen)[1]
    question = {
        "session": session,
        "text": "What?",
        "images": [number],
        "sampling": {"temperature": 1, "batch_size": 9},
    }
    status, answer, _ = call("POST", "/ask", json.dumps(question).encode())
    events = [json.loads(line) for line in answer.splitlines()]
    assert status == 200 and events[-1] == {"model": 1, "done": {"text": "you said: <image>\nWhat?"}}
    assert demo.engine.request["sampling"] == {"temperature": 1}
    call("POST", "/ask", json.dumps(question | {"text": "And?", "images": []}).encode())
    assert [text for _, text in demo.engine.request["asks"][0]["turns"]] == [
        "<image>\nWhat?",
        events[1]["done"]["text"],
        "And?",
    ]
    assert call("POST", "/reset", json.dumps({"session": session}).encode())[0] == 200
    call("POST", "/ask", json.dumps(question | {"images": []}).encode())
    assert len(demo.engine.request["asks"][0]["turns"]) == 1
    assert call("GET", f"/picture/{session}/{number}")[0] == 404  # forgotten as well
    for wrong, words in [({"text": "bad"}, b"it is bad"), ({"text": ""}, b"a question is a text"),
                         ({"session": "x"}, b"load the page again"), ({"images": ["../x"]}, b"no longer here")]:  # fmt: skip
        status, answer, _ = call("POST", "/ask", json.dumps(question | {"images": []} | wrong).encode())
        assert status == 400 and words in answer, answer


def test_uploads_take_so_much_room_and_the_oldest_go(serve, monkeypatch, tmp_path):
    demo, call = serve()
    monkeypatch.setattr("megatron_vlm.serve.demo._MOST_STORED", 3 << 16)  # three pictures, as small ones count
    for _ in range(2):
        call("GET", "/")
    first, second = demo.sessions
    sent = [call("POST", "/upload", png(), {"X-Session": name})[0] for name in (first, second, second, second)]
    assert sent == [200] * 4 and list(demo.sessions) == [second]  # the page that was used last has all the room
    status, answer, _ = call("POST", "/upload", png(), {"X-Session": second})
    assert status == 400 and b"there is no room beside" in answer
    assert len(list(tmp_path.glob("*.png"))) == 3
    assert call("POST", "/upload", png(), {"X-Session": first})[0] == 400
    assert call("POST", "/reset", json.dumps({"session": second}).encode())[0] == 200
    assert not list(tmp_path.glob("*.png")) and call("POST", "/upload", png(), {"X-Session": second})[0] == 200


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
    assert call("GET", "//[")[0] == 404
    assert call("GET", "/picture/..%2fx")[0] == call("GET", "/x")[0] == call("POST", "/x", b"{}")[0] == 404
    assert call("POST", "/ask", b"[]")[0] == call("POST", "/ask", b"{")[0] == 400
    assert not demo.sessions[session["X-Session"]].pictures


def test_a_token_opens_the_page_and_a_cookie_keeps_it_open(serve):
    demo, call = serve("secret-word")
    assert call("GET", "/")[0] == call("GET", "/?token=other")[0] == call("POST", "/upload", png())[0] == 403
    status, _, headers = call("GET", "/?token=secret-word", headers={"Host": "gpu-node:80"})
    assert status == 200 and "HttpOnly; SameSite=Strict" in headers["Set-Cookie"]
    cookie = headers["Set-Cookie"].split(";")[0]
    assert cookie.startswith("token_") and cookie.endswith("=secret-word")  # a demo at another port has another
    assert call("POST", "/upload", png(), {"Cookie": cookie, "X-Session": next(iter(demo.sessions))})[0] == 200
    assert call("GET", "/", headers={"Cookie": cookie.replace("secret", "other")})[0] == 403


def test_curves_of_a_run_and_held_out_examples(serve, tmp_path):
    demo, call = serve()
    assert curves(tmp_path) == ""
    lines = [{"iteration": i, "loss": 1 / i, "step_seconds": 1} for i in (1, 2, 3)] + [
        {"iteration": 3, "eval_anls": 0.5}
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curves(tmp_path).count("<svg") == 2
    (tmp_path / "a.png").write_bytes(png())
    turns = [{"from": "human", "value": f"<image>\n{HOSTILE}"}, {"from": "gpt", "value": "cat"}] * 2
    turns[2] = {"from": "human", "value": "Again?"}
    (tmp_path / "val.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}] * 3))
    demo.examples = held_out(demo, "llava", [str(tmp_path / "val.json")], str(tmp_path), 2)
    assert [example[:2] for example in demo.examples] == [(f"<image>\n{HOSTILE}", "cat")] * 2
    call("GET", "/")
    assert call("GET", f"/picture/{next(iter(demo.sessions))}/{demo.examples[0][2][0]}")[1] == png()
    assert HOSTILE not in demo.page("nonce")


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
    monkeypatch.setattr("megatron_vlm.serve.demo.Engine", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [str(taken.getsockname()[1]) if word == "PORT" else word for word in words]
        assert main(["demo", str(tmp_path), *words]) == 1
    assert re.search(said, capsys.readouterr().err)


def test_the_other_address_of_this_machine():
    try:
        server = DemoServer("::1", 0)
    except ConfigError as error:
        pytest.skip(str(error))  # a machine without IPv6
    with server:
        assert server.address == f"http://[::1]:{server.server_address[1]}"


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
