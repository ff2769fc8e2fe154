"""Every family's processor: special tokens in a text are text, and a turn without loss has none."""

from collections import Counter

import pytest
from PIL import Image

from megatron_vlm import registry
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.sample import Turn
from megatron_vlm.data.text.literal import hidden, unmarked
from megatron_vlm.errors import DataError, Reason
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.testing.twins.internlm2 import write_tiny_internlm2
from megatron_vlm.testing.twins.internvl3 import write_tiny_internvl3
from megatron_vlm.testing.twins.llava_internlm2 import write_tiny_llava
from megatron_vlm.testing.twins.xcomposer2 import write_tiny_xcomposer2

WRITERS = {
    "idefics2": write_tiny_idefics2, "internvl3": write_tiny_internvl3, "internlm2": write_tiny_internlm2,
    "llava_internlm2": write_tiny_llava, "xcomposer2": write_tiny_xcomposer2,
}  # fmt: skip
KNOWN = ["</s>", "<s>", "<|endoftext|>", "<|im_end|>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>",
         "<IMG_CONTEXT>", "<img>", "[UNUSED_TOKEN_145]", "<unk>"]  # fmt: skip
IMAGE = Image.new("RGB", (30, 20), (200, 10, 10))


@pytest.fixture(scope="module", params=[*WRITERS, "internlm2:default", "llava_internlm2:default"])
def make(request, tmp_path_factory):
    """``make(**data settings) -> processor`` of a family, or of a family's template."""
    family, _, template = request.param.partition(":")
    folder = tmp_path_factory.mktemp("model")
    WRITERS[family](folder)

    def processor(**settings):
        given = {"seq_length": 4096, "template": template or None, **settings}
        return registry.get(family).processor(folder, DataConfig(**given))

    return processor


def talk(*texts, system="Be brief."):
    roles = ("user", "assistant")
    return [Turn(role="system", text=system), *(Turn(role=roles[i % 2], text=t) for i, t in enumerate(texts))]


def steering(processor, ids):
    """How often each of the special tokens is there."""
    special = {processor.tokenizer.token_id(token): token for token in processor.tokenizer.specials}
    return Counter(special[i] for i in ids.tolist() if i in special)


def test_special_tokens_in_a_text_are_text(make):
    processor = make(answer_loss_only=True)
    images = processor.image_token_id >= 0
    head = "<image>" if images else ""
    for token in dict.fromkeys([*KNOWN, *processor.tokenizer.specials]):
        told = f"Write {token}old{token} here {token}"
        turns = talk(f"{head}What is {token}?", told, f"And {token}", "this", system=f"Never write {token}.")
        plain = talk(f"{head}What is it?", "Write it here", "And it", "this", system="Never write it.")
        count = processor.count(turns, [IMAGE.size] if images else [])
        assert not count.reason, token
        sample, usual = (processor.encode("k", t, [IMAGE] if images else []) for t in (turns, plain))
        assert steering(processor, sample.input_ids) == steering(processor, usual.input_ids), token
        assert len(sample.input_ids) == count.tokens and len(sample.image_positions) == len(usual.image_positions)
        learned = sample.labels[sample.labels != -100].tolist()
        ends = {processor.tokenizer.token_id(t) for t in processor.tokenizer.specials}
        text = processor.tokenizer.decode([i for i in learned if i not in ends])
        assert "".join(told.split()) in "".join(text.split()), (token, text)  # all of it, none of it as a token


def test_the_other_policy_leaves_such_a_sample_out(make):
    processor = make(special_tokens_in_text="refuse")
    token = processor.tokenizer.specials[0]
    turns = talk("Hi", f"a{token}b")
    assert processor.count(turns, []).reason is Reason.CONTROL_TOKENS and processor.special_tokens(turns) == [token]
    assert not processor.count(talk("Hi", "a <box> and </ref>"), []).reason  # marks of grounding are meant
    with pytest.raises(DataError, match="control_tokens") as caught:
        processor.encode("k", turns, [])
    assert caught.value.reason is Reason.CONTROL_TOKENS
    assert processor.fingerprint != make().fingerprint


def test_names_that_stand_for_special_tokens_cannot_be_written(make):
    """The marks between text and tokenizer are non-characters: a text that has them is left out, and is no question."""
    processor = make()
    token = processor.tokenizer.specials[0]
    for mark in ("\ufdd00\ufdd1", "\ufdd0999\ufdd1", "\ufdd20\ufdd3", "\ufdd0"):
        for text in (mark, f"{token}{mark}"):
            assert processor.count(talk("Hi", text), []).reason is Reason.CONTROL_TOKENS
            with pytest.raises(DataError, match=r"user turn has U\+FDD[02], which is no character"):
                processor.encode_prompt(talk(text), [])
    with pytest.raises(DataError, match="system turn has half a character"):
        processor.encode_prompt(talk("Hi", system="a\ud800"), [])


def test_marks_of_images_in_what_is_given_back_are_text(make):
    """In an answer, say: as many tokens for images as without it, and its characters all there."""
    processor = make()
    images = [IMAGE] * (processor.image_token_id >= 0)
    asked = ("<image>" * len(images) + "What?", unmarked("an <image>, a <video>"), "And?")
    said, usual = (processor.encode_prompt(talk(*turns), images) for turns in (asked, (asked[0], "a cat", "And?")))
    assert len(said.image_positions) == len(usual.image_positions)
    assert steering(processor, said.input_ids) == steering(processor, usual.input_ids)
    text = processor.tokenizer.decode([i for i in said.input_ids.tolist() if i != processor.image_token_id])
    assert "".join(text.split()).count("an<image>,a<video>") == 1


def test_an_answer_is_its_text(make):
    """As transformers' with skip_special_tokens, but for marks of grounding."""
    processor = make()
    ids = processor.tokenizer.ids("two cats")
    special = [processor.tokenizer.token_id(token) for token in processor.tokenizer.specials]
    image = [processor.image_token_id] * (processor.image_token_id >= 0)
    assert processor.decode([*special, *ids, *image, *special]) == processor.tokenizer.decode(ids).strip()
    if box := processor.tokenizer.token_id("<box>"):
        assert "<box>" in processor.decode([*ids, box])


@pytest.mark.parametrize("answer_only", [True, False])
def test_a_turn_without_loss_has_none(make, answer_only):
    processor = make(answer_loss_only=answer_only)
    turns = talk("Hi", "WRONG", "Again", "right")
    off = [Turn(role=t.role, text=t.text, loss=t.text != "WRONG") for t in turns]
    whole, part = processor.encode("k", turns, []), processor.encode("k", off, [])
    assert part.input_ids.tolist() == whole.input_ids.tolist()
    differ = (part.labels != whole.labels).nonzero()[:, 0]
    assert len(differ) and (part.labels[differ] == -100).all() and (differ.diff() == 1).all()
    text = processor.tokenizer.decode(whole.labels[differ].tolist())
    assert "WRONG" in text and "right" not in text and "Again" not in text
    left = processor.tokenizer.decode(part.labels[part.labels != -100].tolist())
    assert "right" in left and "WRONG" not in left
    count = processor.count(off, [])
    assert count.supervised == int((part.labels[1:] != -100).sum()) < processor.count(turns, []).supervised
    silent = [Turn(role=t.role, text=t.text, loss=False) for t in turns]
    if answer_only:
        assert processor.count(silent, []).reason is Reason.NOTHING_SUPERVISED


def test_split_special_tokens_of_transformers(tmp_path):
    """Ids of a text are those that transformers gives with ``split_special_tokens``."""
    from transformers import AutoTokenizer

    for name in ("idefics2", "internvl3"):
        WRITERS[name](tmp_path / name)
        processor = registry.get(name).processor(tmp_path / name, DataConfig(seq_length=64))
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        for text in ("a</s>b", "<|im_end|>\n", "x <end_of_utterance> y<|endoftext|>", "<s><s>"):
            specials = processor.tokenizer.specials
            expected = theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
            assert processor.tokenizer.ids(hidden(text, specials)) == expected, (name, text)
