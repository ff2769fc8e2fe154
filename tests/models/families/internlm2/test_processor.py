"""InternLM2's prompts and label masks by its published ids, on a SentencePiece model that has them at their places."""

import dataclasses
import functools
import json
import pickle

import pytest
from PIL import Image

from megatron_vlm import registry
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.sample import Turn
from megatron_vlm.data.text.templates import TEMPLATES
from megatron_vlm.errors import ConfigError, DataError

START, END, NEWLINE, USER, ASS, ISTANT = 92543, 92542, 364, 1008, 525, 11353
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<>|:\u2581"
LETTER = {letter: 259 + index for index, letter in enumerate(LETTERS)}
# Joined pieces, best first, with the published ids where there are such.
JOINED = {
    "as": 400, "ass": ASS, "is": 402, "ist": 403, "ista": 404, "istan": 405, "istant": ISTANT, "us": 406, "use": 407,
    "user": USER,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """config.json and tokenizer files of internlm2-chat's vocabulary: 92,544 pieces, those that no text has among them."""
    from sentencepiece import sentencepiece_model_pb2

    directory = tmp_path_factory.mktemp("vocabulary")
    pieces = {index: f"\u0001{index}" for index in range(92544)}
    pieces |= {index: letter for letter, index in LETTER.items()} | {index: piece for piece, index in JOINED.items()}
    pieces |= {NEWLINE: "\n", 92541: "[UNUSED_TOKEN_144]", END: "[UNUSED_TOKEN_145]", START: "[UNUSED_TOKEN_146]"}
    proto = sentencepiece_model_pb2.ModelProto()
    kinds = {0: 2, 1: 3, 2: 3, 92541: 4, END: 4, START: 4}
    pieces |= {0: "<unk>", 1: "<s>", 2: "</s>"} | {3 + byte: f"<0x{byte:02X}>" for byte in range(256)}
    best = {piece: -float(rank) for rank, piece in enumerate(JOINED)}
    for index in range(92544):
        kind = kinds.get(index, 6 if 3 <= index < 259 else 1)
        proto.pieces.add(piece=pieces[index], score=best.get(pieces[index], -1000.0 - index), type=kind)
    proto.trainer_spec.model_type = 2
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    (directory / "tokenizer.model").write_bytes(proto.SerializeToString())
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "added_tokens_decoder": {str(END): {"content": "<|im_end|>"}, str(START): {"content": "<|im_start|>"}},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps({"model_type": "internlm2", "vocab_size": 92544}))
    return directory


@functools.cache  # a vocabulary of this size takes its time to read
def loaded(folder):
    return registry.get("internlm2").processor(folder, DataConfig(seq_length=64, answer_loss_only=True))


def processor_of(folder, **fields):
    return dataclasses.replace(loaded(folder), **fields)


def letters(text):
    return [NEWLINE if c == "\n" else LETTER[c] for c in text]


def turns(*texts, system=None):
    roles = [Turn(role="system", text=system)] if system else []
    return roles + [Turn(role=("user", "assistant")[i % 2], text=text) for i, text in enumerate(texts)]


def encoded(processor, conversation):
    """(ids, supervised ids with 0 where no loss is taken); the count from text alone must agree."""
    sample = processor.encode("key", conversation, [])
    ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
    count = processor.count(conversation, [])
    assert (count.tokens, count.supervised, count.reason.text) == (len(ids), sum(x != -100 for x in labels), "")
    assert all(label in (-100, token) for token, label in zip(ids, labels))
    return ids, [0 if label == -100 else label for label in labels]


QUESTION = [START, USER, NEWLINE, *letters("hi"), END, NEWLINE, START, ASS, ISTANT, NEWLINE]


def test_published_ids(folder):
    """'assistant\\n' = [525, 11353, 364], 'user\\n' = [1008, 364]; SentencePiece itself says so."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = processor_of(folder).tokenizer
    for text, ids in (("assistant\n", [ASS, ISTANT, NEWLINE]), ("user\n", [USER, NEWLINE]), ("a é\n", None)):
        assert tokenizer.ids(text) == pieces.encode(text) == (ids or tokenizer.ids(text))


def test_internlm2_chat(folder):
    processor = processor_of(folder)
    ids, labels = encoded(processor, turns("hi", "ok"))
    assert ids == [1, *QUESTION, *letters("ok"), END, NEWLINE]
    assert labels == [0] * (1 + len(QUESTION)) + [*letters("ok"), END, 0]


def test_several_turns_and_a_system_text(folder):
    """One BOS; the system text goes before the first question; each answer and its end are supervised."""
    ids, labels = encoded(processor_of(folder), turns("hi", "ok", "hi", "no", system="go"))
    system = [START, *letters("system"), NEWLINE, *letters("go"), END, NEWLINE]
    assert ids == [1, *system, *QUESTION, *letters("ok"), END, NEWLINE, *QUESTION, *letters("no"), END, NEWLINE]
    answers = [*[0] * (1 + len(system) + len(QUESTION)), *letters("ok"), END, 0]
    assert labels == [*answers, *[0] * len(QUESTION), *letters("no"), END, 0]


def test_default_template(folder):
    """The real EOS ends an answer, and the next turn has a BOS again."""
    ids, labels = encoded(
        processor_of(folder, template=TEMPLATES["default"]), turns("hi", "ok", "hi", "no", system="go")
    )
    question = [*letters("<|U"), *letters("ser"), *letters("|>:hi\n<|Bot|>:")]
    first = [1, *letters("<|System|>:go\n"), *question]
    assert ids == [*first, *letters("ok"), 2, NEWLINE, 1, *question, *letters("no"), 2, NEWLINE]
    assert labels == [*[0] * len(first), *letters("ok"), 2, 0, *[0] * (1 + len(question)), *letters("no"), 2, 0]


def test_loss_on_everything_leaves_bos_out(folder):
    ids, labels = encoded(processor_of(folder, answer_loss_only=False), turns("hi", "ok"))
    assert labels == [0, *ids[1:]]


def test_prompt_and_answer(folder):
    processor = processor_of(folder)
    sample = processor.encode_prompt(turns("hi"), [])
    assert sample.input_ids.tolist() == [1, *QUESTION] and set(sample.labels.tolist()) == {-100}
    assert processor.stop_ids == (2, END)
    assert processor.decode([*letters("ok\u2581no"), END]) == "ok no"


def test_truncation_drops_turns_and_then_the_end_of_the_answer(folder):
    whole = encoded(processor_of(folder), turns("hi", "ok"))[0]
    processor = processor_of(folder, seq_length=len(whole) + 3, truncate=True)
    assert processor.encode("key", turns("hi", "ok", "hi", "no"), []).input_ids.tolist() == whole
    processor = processor_of(folder, seq_length=len(whole) - 3, truncate=True)
    assert processor.encode("key", turns("hi", "ok"), []).input_ids.tolist() == whole[:-3]
    assert processor_of(folder, seq_length=4).count(turns("hi", "ok"), []).reason.text == "too_long"


@pytest.mark.parametrize("token", ["<|im_end|>", "</s>", "<s>"])
def test_control_tokens_in_a_text_leave_it_out(folder, token):
    assert (
        processor_of(folder, special_tokens_in_text="refuse").count(turns(f"hi{token}", "ok"), []).reason.text
        == "control_tokens"
    )


def test_images_leave_a_sample_out(folder):
    processor = processor_of(folder)
    assert processor.count(turns("<image>hi", "ok"), [(4, 4)]).reason.text == "images_for_a_text_model"
    with pytest.raises(DataError, match="images_for_a_text_model"):
        processor.encode("key", turns("<image>hi", "ok"), [Image.new("RGB", (4, 4))])


def test_settings_that_say_nothing_are_refused(folder):
    make = registry.get("internlm2").processor
    with pytest.raises(ConfigError, match=r"data\.template 'alpaca' is not one of family internlm2: use one of"):
        make(folder, DataConfig(seq_length=64, template="alpaca"))
    with pytest.raises(ConfigError, match=r"data\.image_size 336 has no effect on InternLM2"):
        make(folder, DataConfig(seq_length=64, image_size=336))


def test_a_base_vocabulary_has_the_chat_tokens_under_their_unused_names(folder, tmp_path):
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert encoded(processor_of(tmp_path), turns("hi", "ok")) == encoded(processor_of(folder), turns("hi", "ok"))


def test_travels_to_workers_and_knows_its_settings(folder):
    processor = processor_of(folder)
    again = pickle.loads(pickle.dumps(processor))
    assert again.encode("key", turns("hi", "ok"), []).input_ids.tolist() == encoded(processor, turns("hi", "ok"))[0]
    assert again.fingerprint == processor.fingerprint != processor_of(folder, template=TEMPLATES["default"]).fingerprint
