"""Prompt templates of the InternLM2 and LLaVA families: conversations -> pieces, and the same as a chat template of HF.

    [BOS] system user | answer | (EOS) | separator [BOS] user | answer ...

XTuner tokenises each of these on its own, a system text together with the user turn after it; where an answer ends in the
EOS token of the vocabulary the next turn begins with BOS again. LLaVA-1.5 tokenises the whole prompt as one string. Source
of the rules: XTuner 0.1, ``xtuner/utils/templates.py`` and ``encode_fn`` of ``xtuner/dataset/utils.py``; LLaVA,
``llava/conversation.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vlm.data.sample import Turn
from megatron_vlm.data.text.chat import Piece

IMAGE = "<image>"


@dataclass(frozen=True, kw_only=True)
class Template:
    """A prompt format; ``{}`` stands for a turn's text.

    Attributes:
        name: users know it by.
        system: leading text.
        user: a user turn, with the header that an answer follows.
        answer: an answer and what ends it; both are supervised.
        eos: the answer is followed by the vocabulary's EOS token, supervised, and the next turn by BOS again.
        separator: follows an answer, never supervised.
        special: tokens that the vocabulary must have.
        whole: the prompt is tokenised as one string, not piece by piece.
    """

    name: str
    system: str
    user: str
    answer: str = "{}"
    eos: bool = False
    separator: str = "\n"
    special: tuple[str, ...] = ()
    whole: bool = False

    def pieces(self, turns: Sequence[Turn], bos: int | None, eos: int) -> list[Piece]:
        """Renders [system] (user assistant)+, or a conversation that stops where the assistant is to answer.

        Args:
            turns: the conversation.
            bos: id that begins a conversation; None: none does.
            eos: id of the EOS token.
        """
        pieces: list[Piece] = []
        system, begin = "", bos is not None
        for turn in turns:
            if turn.role == "system":
                system = _fill(self.system, turn)
            elif turn.role == "user":
                if begin and bos is not None:
                    pieces.append(Piece(ids=(bos,)))
                pieces.append(Piece(text=system + _fill(self.user, turn), loss=turn.loss))
                system, begin = "", self.eos
            else:
                pieces.append(Piece(text=_fill(self.answer, turn), answer=True, loss=turn.loss))
                if self.eos:
                    pieces.append(Piece(ids=(eos,), answer=True, loss=turn.loss))
                if self.separator:
                    pieces.append(Piece(text=self.separator))
        return pieces

    def jinja(self, bos: str, eos: str) -> str:
        """The same as a chat template of transformers, without the BOS that its tokenizer puts in front.

        Images of a turn come as content parts, each followed by a line break as in the training data.
        """
        again = "{% if not loop.first and messages[loop.index0 - 1]['role'] == 'assistant' %}" + bos + "{% endif %}"
        blocks = {
            "system": self.system,
            "user": (again if self.eos else "") + self.user,
            "assistant": self.answer + (eos if self.eos else "") + self.separator,
        }
        cases = "".join(
            ("{% if" if role == "system" else "{% elif")
            + f" message['role'] == '{role}' %}}"
            + block.replace("{}", "{{ text(message['content']) }}")
            for role, block in blocks.items()
        )
        # A line break right after a block tag is dropped by transformers' settings of Jinja: it is written as an expression.
        cases = cases.replace("\n", "{{ '\\n' }}")
        return (
            "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
            "{% if part['type'] == 'image' %}{{ '"
            + IMAGE
            + "\\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
            "{% endif %}{% endmacro %}{% for message in messages %}" + cases + "{% endif %}{% endfor %}"
        )


def _fill(form: str, turn: Turn) -> str:
    return form.replace("{}", turn.text)


TEMPLATES = {
    "internlm2_chat": Template(
        name="internlm2_chat",
        system="<|im_start|>system\n{}<|im_end|>\n",
        user="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        answer="{}<|im_end|>",
        special=("<|im_start|>", "<|im_end|>"),
    ),
    "default": Template(name="default", system="<|System|>:{}\n", user="<|User|>:{}\n<|Bot|>:", eos=True),
    "vicuna": Template(
        name="vicuna", system="{} ", user="USER: {} ASSISTANT:", answer=" {}</s>", separator="", special=("</s>",), whole=True
    ),
    "mistral": Template(
        name="mistral", system="<<SYS>>\n{}\n<</SYS>>\n\n", user="[INST] {} [/INST]", answer=" {}</s>", separator="",
        special=("</s>",), whole=True,
    ),
    "onevision": Template(
        name="onevision", system="<|im_start|>system \n{}<|im_end|>", user="<|im_start|>user {}<|im_end|><|im_start|>assistant\n",
        answer="{}<|im_end|>", separator="", special=("<|im_start|>", "<|im_end|>"), whole=True,
    ),
}  # fmt: skip
