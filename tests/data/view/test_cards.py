"""Parts of pages about samples: what is left out and why, which samples are wanted, buttons."""

import json
from collections import Counter

from megatron_vlm.data.sample import RawSample, Turn
from megatron_vlm.data.view.cards import buttons, matches, rejected_of, turns


def test_left_out_by_reason(tmp_path):
    lines = [{"file": "a", "record": n, "reason": f"no <b>{n}</b>", "kind": "missing image"} for n in range(60)]
    lines.append({"file": "a", "record": 60, "reason": "of an older build"})
    (tmp_path / "rejected.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = rejected_of([tmp_path, tmp_path / "none"])
    assert found.counts == {"missing image": 60, "cannot be used": 1}
    html = found.html()
    assert "61 samples" in html and "and 11 more" in html and "no &lt;b&gt;0" in html and "<b>" not in html
    assert rejected_of([]).html() == ""


def test_which_samples_are_wanted():
    sample = RawSample(key="k-1", label="ID", turns=(Turn(role="user", text="Où ?"),), image_names=("x.PNG",))
    assert all(matches(sample, word) for word in ("", "K-1", "id", "où", "png")) and not matches(sample, "no")


def test_turns_are_labelled():
    html = turns([Turn(role="user", text="<i>"), Turn(role="assistant", text="b", loss=False)])
    assert "&lt;i&gt;" in html and "assistant (no loss)" in html and html.count('class="role"') == 2


def test_buttons_where_there_is_a_choice():
    assert buttons(Counter(all=3, pictured=3)) == ""
    html = buttons(Counter(all=3, pictured=2, textonly=1))
    assert 'id="only-pictured"' in html and "without images (1)" in html and html.count(" checked") == 1
