"""The page of mistakes: the worst first, with pictures, and nothing of what texts and names say is run."""

import json

import numpy as np
from PIL import Image

from megatron_vlm.data.formats.records import VideoSettings
from megatron_vlm.training.answering.mistakes import mistakes_page
from megatron_vlm.training.answering.questions import questions

HOSTILE = "<script>alert(1)</script>\" onerror='x'"


def test_a_page_of_hostile_names(tmp_path):
    name = '"><img src=x onerror=alert(1)>.png'
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / name)
    turns = [{"from": "human", "value": f"<image>\n{HOSTILE}"}, {"from": "gpt", "value": "abcd"}]
    records = [{"id": HOSTILE, "image": name, "conversations": turns, "kind": HOSTILE} for _ in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    asked = list(questions("llava", [str(tmp_path / "a.json")], str(tmp_path), subset_key="kind"))
    texts = ["abcd", "abxd", HOSTILE, "none"]
    page = mistakes_page(HOSTILE, asked, texts, ["anls"], ["of", "anls"], [[HOSTILE, "0.4"]], most=2)
    assert "<script" not in page and "<img src=x" not in page and page.count("data:image/png;base64,") == 2
    assert "3 of 4 answers are not fully right by anls, the 2 worst of them here" in page
    assert "abxd" not in page and "default-src &#x27;none" not in page and "default-src 'none'" in page
    # Of a video the frames that the model saw.
    (tmp_path / "clip").mkdir()
    for index in range(3):
        Image.fromarray(np.full((8, 8, 3), index, dtype=np.uint8)).save(tmp_path / "clip" / f"{index}.png")
    turns = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "abcd"}]
    (tmp_path / "b.json").write_text(json.dumps([{"video": "clip", "conversations": turns}]))
    clip = list(questions("llava", [str(tmp_path / "b.json")], str(tmp_path)))
    page = mistakes_page("m", clip, ["x"], ["anls"], [], [], most=2, video=VideoSettings(max_frames=2))
    assert page.count("data:image/png;base64,") == 2
    (tmp_path / name).unlink()
    assert "cannot read image" in mistakes_page("m", asked, texts, ["cer"], [], [], most=9)
