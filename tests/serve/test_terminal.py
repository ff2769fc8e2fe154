"""`megatron-vlm chat` as a person types it, in a pseudo terminal: pictures, turns, two models, Ctrl-C while text streams."""

import json
import os
import sys
import time
from pathlib import Path

from tests.serve.oracle import hf_answer

ROOT = Path(__file__).parents[2]


def spawn(tmp_path, *words):
    import pexpect

    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
    }
    command = ["-m", "megatron_vlm", "chat", *map(str, words), "--device", "cpu"]
    options = dict(env=variables, timeout=60, dimensions=(50, 160), encoding="utf-8")
    return pexpect.spawn(sys.executable, command, codec_errors="replace", **options)  # the terminal's ^C falls anywhere


def test_a_talk_with_two_models(twins, picture, tmp_path):
    child = spawn(tmp_path, twins[1], "--compare", twins[0], "--max-new-tokens", 900)
    child.expect("lists the commands")

    def say(text, wait):
        child.send(text + "\r")
        child.expect(wait)

    def interrupted(text):  # an answer would take until the model's last position
        say(text, "tuned")
        time.sleep(0.7)
        child.sendintr()
        child.expect(">>>")

    def saved(name):
        say(f"/save {tmp_path / name}", "saved to")
        return json.loads((tmp_path / name).read_text())

    try:
        child.expect(">>>")
        say(f"/image {picture}", "with the next question: .*noise.png")
        interrupted("What digit is this?")
        interrupted("And now?")
        talks = {"first": saved("first.json")}
        say("RESET", "forgotten")
        interrupted("How many cats?")
        talks["second"] = saved("second.json")
        child.send("/ex\t\x15EXIT\r")  # Ctrl-U takes back what was typed
        child.expect("EXIT.*$")
        child.wait()
    finally:
        child.close(force=True)
    assert child.exitstatus == 0
    for records in talks.values():
        assert [record["id"] for record in records] == [str(twins[0]), str(twins[1])]
        for twin, record in zip(twins, records):
            turns = [({"human": "user", "gpt": "assistant"}[t["from"]], t["value"]) for t in record["conversations"]]
            image = Path(record["image"][0]) if "image" in record else None
            for place in range(1, len(turns), 2):
                said, expected = turns[place][1], hf_answer(twin, turns[:place], image).rstrip("\ufffd").rstrip()
                assert said and (said.startswith(expected) or expected.startswith(said.rstrip("\ufffd"))), turns
    assert len(talks["first"][0]["conversations"]) == 4 and "image" not in talks["second"][0]
    assert "How many cats?" in (tmp_path / "state" / "megatron_vlm" / "chat_history").read_text()
