"""The demo: conversations and pictures of pages that know nothing of each other, curves, examples."""

import io
import json
import threading
import time
from pathlib import Path

from PIL import Image

from megatron_vlm.serve.demo import curves, held_out

ROOT = Path(__file__).parents[2]
HOSTILE = "<img src=x onerror=alert(1)>"


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


def test_a_picture_that_cannot_be_written_is_told_and_takes_no_room(serve, tmp_path, caplog):
    demo, call = serve()
    call("GET", "/")
    (name,) = demo.sessions
    demo.folder = tmp_path / "gone"
    status, answer, _ = call("POST", "/upload", png(), {"X-Session": name})
    assert status == 500 and b"the server failed: No such file" in answer
    assert "a request failed: [Errno 2]" in caplog.text and not demo.sessions[name].stored


def test_a_conversation_that_waits_for_its_turn_is_not_forgotten(serve, monkeypatch):
    demo, call = serve()
    for _ in range(4):
        call("GET", "/")
        demo.session(list(demo.sessions)[-1])
    first, second, _, fourth = demo.sessions
    answered, answers = demo.ask({"session": first, "text": "a"}), []
    next(answered)
    waiting = threading.Thread(target=lambda: answers.extend(demo.ask({"session": second, "text": "b"})))
    waiting.start()
    while not demo.sessions[second].pending:
        time.sleep(0.01)
    monkeypatch.setattr("megatron_vlm.serve.demo._MOST_SESSIONS", 1)
    demo.session(fourth)
    assert set(demo.sessions) == {first, second, fourth}
    list(answered)
    waiting.join(10)
    assert answers[-1]["done"]["text"] == "you said: b" and not demo.sessions[second].pending


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
    # A video is its frames, and an image behind it its own.
    (tmp_path / "clip").mkdir()
    for index in range(2):
        (tmp_path / "clip" / f"{index}.png").write_bytes(png())
    buffer = io.BytesIO()
    Image.new("RGB", (5, 3)).save(buffer, "PNG")
    (tmp_path / "b.png").write_bytes(buffer.getvalue())
    turns = [{"from": "human", "value": "<video> and <image>?"}, {"from": "gpt", "value": "cat"}]
    (tmp_path / "val.json").write_text(json.dumps([{"video": "clip", "image": "b.png", "conversations": turns}]))
    ((text, _, ids),) = held_out(demo, "llava", [str(tmp_path / "val.json")], str(tmp_path))
    assert "<video>" not in text and text.count("<image>") == len(ids) == 3
    assert [demo.pictures[number].read_bytes() == buffer.getvalue() for number in ids] == [False, False, True]
