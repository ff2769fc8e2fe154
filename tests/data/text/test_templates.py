"""Prompt templates: pieces worked out by hand, and the chat template of transformers that writes the same text."""

import numpy as np
import pytest

from megatron_vlm.data.sample import Turn
from megatron_vlm.data.text.chat import Tokens, fit
from megatron_vlm.data.text.templates import TEMPLATES

SYSTEM, USER, ANSWER = "Be {brief}.", "Hi {}\n", "ok"
TURNS = [
    Turn(role="system", text=SYSTEM),
    Turn(role="user", text=USER),
    Turn(role="assistant", text=ANSWER),
    Turn(role="user", text="and"),
]
CHAT = (
    "<s><|im_start|>system\nBe {brief}.<|im_end|>\n<|im_start|>user\nHi {}\n<|im_end|>\n<|im_start|>assistant\n"
    "ok<|im_end|>\n<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n"
)
EXPECTED = {
    "internlm2_chat": (CHAT, "ok<|im_end|>"),
    "default": (
        "<s><|System|>:Be {brief}.\n<|User|>:Hi {}\n\n<|Bot|>:ok</s>\n<s><|User|>:and\n<|Bot|>:",
        "ok</s>",
    ),
    "vicuna": ("<s>Be {brief}. USER: Hi {}\n ASSISTANT: ok</s>USER: and ASSISTANT:", " ok</s>"),
    "mistral": (
        "<s><<SYS>>\nBe {brief}.\n<</SYS>>\n\n[INST] Hi {}\n [/INST] ok</s>[INST] and [/INST]",
        " ok</s>",
    ),
    "onevision": (
        "<s><|im_start|>system \nBe {brief}.<|im_end|><|im_start|>user Hi {}\n<|im_end|><|im_start|>assistant\nok<|im_end|>"
        "<|im_start|>user and<|im_end|><|im_start|>assistant\n",
        "ok<|im_end|>",
    ),
}


def text_of(pieces):
    return "".join(piece.text or {1: "<s>", 2: "</s>"}[piece.ids[0]] for piece in pieces)


@pytest.mark.parametrize("name", TEMPLATES)
def test_pieces(name):
    pieces = TEMPLATES[name].pieces(TURNS, 1, 2)
    assert text_of(pieces) == EXPECTED[name][0]
    assert text_of([piece for piece in pieces if piece.answer]) == EXPECTED[name][1]
    assert text_of(TEMPLATES[name].pieces(TURNS, None, 2)) == EXPECTED[name][0].replace("<s>", "")


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_template_writes_the_same(name):
    """Rendered by transformers' own settings of Jinja; its tokenizer puts the first BOS in front."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = TEMPLATES[name].jinja("<s>", "</s>")
    plain = [{"role": turn.role, "content": turn.text} for turn in TURNS]
    parts = [{"role": turn.role, "content": [{"type": "text", "text": turn.text}]} for turn in TURNS]
    for messages in (plain, parts):
        rendered, _ = render_jinja_template(
            conversations=[messages], chat_template=template, add_generation_prompt=True
        )
        assert "<s>" + rendered[0] == EXPECTED[name][0]
    image = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    rendered, _ = render_jinja_template(conversations=[image], chat_template=template)
    assert rendered[0] == TEMPLATES[name].user.replace("{}", "<image>\nWhat?")


@pytest.mark.parametrize("limit", [3, 7, 8, 500, 1999, 2000, 2400, 3999])
def test_a_long_dialogue_is_cut_in_few_tries(limit):
    """Exchanges of 8 tokens: as many as fit, found without encoding the dialogue once for each of its 500."""
    turns, asked = [Turn(role=role, text="words") for _ in range(500) for role in ("user", "assistant")], []

    def encode(some):
        asked.append(len(some))
        return Tokens(
            ids=np.arange(4 * len(some)), supervised=np.ones(4 * len(some), bool), answer_start=2, num_turns=len(some)
        )

    found = fit(encode, turns, limit, truncate=True, keep=[])
    assert found.truncated and len(found.ids) == (limit // 8 * 8 or limit) and found.num_turns == max(2, limit // 8 * 2)
    assert len(asked) <= 11
