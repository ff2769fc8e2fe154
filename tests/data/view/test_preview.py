"""The preview page: hostile names and texts stay text, and what training leaves out is listed."""

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from megatron_vlm.cli.data import run
from megatron_vlm.data.view.preview import _picture
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
               "img", "ul", "li", "table", "tr", "td", "label", "input"}  # fmt: skip
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
    seen = checked(page_of(folder, idefics2_dir, str(folder / "out"), "--set", "data.on_too_long=drop"))
    assert "2 samples are left out of training:2too long" in seen
    assert "a-000000001: too long" in seen and "a-000000003: too long" in seen


def test_numbers_are_those_of_one_epoch(folder, idefics2_dir):
    words = ["--set", "data.on_too_long=drop", "--set", "data.packing=true"]
    text = page_of(folder, idefics2_dir, str(folder / "out"), "--samples", "24", *words)
    assert "4 samples; here all 2 that can be used, as 1 packed rows" in checked(text)
    assert len(re.findall('class="card textonly"', text)) == 2 and "Epoch 1" not in text
    text = page_of(folder, idefics2_dir, str(folder / "out"), "--samples", "1")
    assert "4 samples; here the first 1 of an epoch" in checked(text)


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """A json with two small pictures in one record, a text alone, and a record whose picture is not there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.png", "b.png"):
        Image.new("RGB", (28, 20), "red" if name == "a.png" else "blue").save(tmp_path / name)

    def record(text, *images):
        talk = [{"from": "human", "value": "<image>" * len(images) + text}, {"from": "gpt", "value": f"回答 {text}"}]
        return {"id": text, "conversations": talk, **({"image": list(images)} if images else {})}

    return write_json(
        tmp_path / "raw.json", [record("two", "a.png", "b.png"), record("none"), record("lost", "absent.png")]
    )


def test_raw_records_need_no_model(raw, tmp_path):
    out = tmp_path / "page.html"
    assert run(["preview", str(raw), "--out", str(out)]) == 0
    text = out.read_text()
    seen = checked(text)
    assert "1 samples are left out of training:1missing image" in seen and "absent.png" in seen
    assert text.count('class="turn assistant"') == 2 and "回答 two" in seen
    assert '<html lang="en">' in text and "Noto Sans CJK SC" in text
    assert (
        re.findall(r'<img class="own" alt="" width="(\d+)" height="(\d+)"', text) == [("168", "120")] * 2
    )  # six times
    assert text.count('class="card pictured"') == text.count('class="card textonly"') == 1 and "with images (1)" in seen
    assert run(["preview", str(raw), "--out", str(out), "--match", "NONE"]) == 0
    assert out.read_text().count('class="card') == 1 and "回答 two" not in out.read_text()


def test_raw_records_as_a_run_trains_them(raw, tmp_path, idefics2_dir, capsys):
    """Under the recipe of the model, a recipe by name, and the folder of a run, which names data and model itself."""
    text = page_of(tmp_path, idefics2_dir, str(raw))
    assert "Settings of recipe finetune_idefics2" in checked(text) and "Settings of recipe" in capsys.readouterr().out
    first, second = (text.split('class="pair"')[number] for number in (1, 2))  # each image beside its own frame
    assert "a.png" in first and "b.png" not in first and "b.png" in second and first.count("<img") == 2
    learned = re.findall(r'<span class="s" title="\d+ tokens">(.*?)</span>', text)
    assert sorted(words.strip() for words in learned) == [
        f"回答 {word}&lt;end_of_utterance&gt;" for word in ("none", "two")
    ]
    assert "1missing image" in checked(text) and list(
        (tmp_path / ".cache" / "megatron_vlm" / "shards").glob("*/manifest.json")
    )
    text = page_of(tmp_path, idefics2_dir, str(raw), "--config", "pretrain_idefics2_llama3")
    assert "Settings of pretrain_idefics2_llama3." in checked(text) and "packed rows of 256" in checked(text)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(
        f"checkpoint: {{load: {idefics2_dir}}}\ndata: {{seq_length: 64, packing: true}}\n"
        f"launch: {{train_json: [{raw}]}}\ntraining: {{seed: 7, global_batch_size: 2}}\n"
    )
    out = tmp_path / "page.html"
    assert run(["preview", "--config", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert "packed rows of 64 tokens" in checked(out.read_text())
    assert run(["stats", "--config", str(tmp_path / "run")]) == 0
    assert "of 2 rows packed" in capsys.readouterr().out


def test_frames_that_are_seen_as_one_stand_side_by_side():
    processor = SimpleNamespace(mean=(0.5,) * 3, std=(0.5,) * 3, tiles=lambda pixels: (0, 0))
    pixels = torch.cat([torch.full((3, 4, 5), value) for value in (-1.0, 1.0)])
    image, caption = _picture(pixels, processor)
    assert caption == "2 frames of 5 x 4" and image.size == (10, 4)
    assert image.getpixel((4, 0)) == (0, 0, 0) and image.getpixel((5, 0)) == (255, 255, 255)
    assert _picture(pixels[:3], processor)[1] == "5 x 4"
