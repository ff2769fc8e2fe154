"""The preview page: hostile names and texts stay text, and what training leaves out is listed."""

import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from megatron_vlm.cli.data import run
from tests.data.formats.make import picture, write_json, write_tar

EVIL = '"\'><script>alert(1)</script><img src=x onerror=alert(2)><a href="javascript:alert(3)">&amp;'
NAME = EVIL.replace("/", "|")  # of a file


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def page_of(tmp_path, model, *words):
    out = tmp_path / "page.html"
    assert run(["preview", *words, "--model", str(model), "--seq-length", "256", "--out", str(out)]) == 0
    return out.read_text()


def checked(text):
    """Fails on any element that could do something; returns what a reader sees."""
    tags = Tags(text)
    allowed = {"html", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "span", "div", "a", "figure", "figcaption",
               "img", "ul", "li"}  # fmt: skip
    for tag, attributes in tags.tags:
        assert tag in allowed and not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert attributes.get("href", "#").startswith("#") and attributes.get("src", "data:image/png").startswith(
            "data:image/png"
        )
    policy = [a["content"] for tag, a in tags.tags if tag == "meta" and "content" in a]
    assert len(policy) == 1 and "default-src 'none'" in policy[0] and "script-src" not in policy[0]
    assert (
        tags.tags[1][0] == "meta" and tags.tags[2][1].get("http-equiv") == "Content-Security-Policy"
    )  # before all else
    return "".join(tags.texts)


def test_hostile_names_ids_and_texts(tmp_path, idefics2_dir):
    talk = [{"from": "human", "value": f"<image>{EVIL}"}, {"from": "gpt", "value": EVIL}]
    tars = tmp_path / NAME
    members = [
        (f"{NAME}.{EVIL.split('/')[0]}.png", picture()),
        (f"{NAME}.json", json.dumps({"id": EVIL, "conversations": talk}).encode()),
    ]
    write_tar(tars / f"{NAME}.tar", members, format=2)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / NAME).write_bytes(picture(1))
    write_json(tmp_path / f"{NAME}.jsonl", [{"id": EVIL, "image": NAME, "conversations": talk}])
    assert run(["build", "--format", "webdataset", "--input", str(tars), "--out", str(tmp_path / "a")]) == 0
    words = ["--input", str(tmp_path / f"{NAME}.jsonl"), "--image-root", str(tmp_path / "images")]
    assert run(["build", "--format", "llava", *words, "--out", str(tmp_path / "b")]) == 0
    seen = checked(page_of(tmp_path, idefics2_dir, str(tmp_path / "a"), str(tmp_path / "b")))
    assert seen.count("<script>alert(1)") >= 6  # of both: texts, image names, the tar's name, sources


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "dot.png")

    def record(text):
        return {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": text}]}

    write_json(tmp_path / "a.json", [record("yes"), record("long " * 300), record("no"), record(EVIL * 40)])
    assert run(["build", "--format", "llava", "--input", str(tmp_path / "a.json"), "--out", str(tmp_path / "out")]) == 0
    return tmp_path


def test_what_training_leaves_out_is_listed(folder, idefics2_dir):
    seen = checked(page_of(folder, idefics2_dir, str(folder / "out")))
    assert "2 samples are left out of training" in seen
    assert "a-000000001: too long" in seen and "a-000000003: too long" in seen


def test_numbers_are_those_of_one_epoch(folder, idefics2_dir):
    text = page_of(folder, idefics2_dir, str(folder / "out"), "--samples", "24")
    assert "4 samples; here all 2 that can be used, as 1 packed rows" in checked(text)
    assert len(re.findall('class="card"', text)) == 2 and "Epoch 1" not in text
    text = page_of(folder, idefics2_dir, str(folder / "out"), "--samples", "1", "--set", "data.packing=false")
    assert "4 samples; here the first 1 of an epoch" in checked(text)
