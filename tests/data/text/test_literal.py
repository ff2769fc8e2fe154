"""Special tokens that a text writes: marks and back, and the tokenizer's own under other names."""

import json

from megatron_vlm.data.text.literal import RESERVED, found, hidden, hides, renamed, shown, specials_of, unmarked

SPECIALS = ("</s>", "<|im_end|>", "<|im_end|>x")


def test_which_tokens_no_text_may_write():
    assert specials_of(["</s>", "<image>", "<box>", "</box>", "<|box_start|>", "<pad>"]) == ("</s>", "<pad>")


def test_a_text_is_hidden_and_shown_again():
    text = "a</s><|im_end|>xb<|im_end|>"
    assert found(text, SPECIALS) == list(SPECIALS) and found("a</ s>", SPECIALS) == []
    marks = hidden(text, SPECIALS)
    assert hides(marks) and not found(marks, SPECIALS) and not hides(hidden("plain", SPECIALS))
    assert shown(marks, SPECIALS) == text
    prompt = shown(marks + "</s>", SPECIALS)  # the template's own
    assert prompt.startswith(text) and not found(prompt.removeprefix(text), SPECIALS)
    assert RESERVED.search(prompt.removeprefix(text))


def test_a_text_marks_no_place():
    text = unmarked("an <image> or a <video>")
    assert hides(text) and "<image>" not in text and "<video>" not in text
    assert shown(text + "<image>", (*SPECIALS, "<image>")).startswith("an <image> or a <video>\ufdd2")


def test_a_tokenizer_keeps_its_ids():
    added = [{"id": 2, "content": "</s>"}, {"id": 3, "content": "<other>"}]
    model = {"vocab": {"a": 0, "</s>": 2}, "unk_token": "</s>"}
    data = json.loads(renamed(json.dumps({"added_tokens": added, "model": model}), SPECIALS))
    name = shown("</s>", SPECIALS)
    assert [token["content"] for token in data["added_tokens"]] == [name, "<other>"]
    assert data["model"] == {"vocab": {"a": 0, name: 2}, "unk_token": name}
    pieces = {"added_tokens": [], "model": {"vocab": [["a", -1.0], ["</s>", 0.0]]}}
    assert json.loads(renamed(json.dumps(pieces), SPECIALS))["model"]["vocab"] == [["a", -1.0], [name, 0.0]]
