"""Prompt templates of InternVL's generations, by the names that its code gives them (``--conv_style``).

    <|im_start|>system ... <|im_end|> <|im_start|>user ... <|im_end|> <|im_start|>assistant ... <|im_end|>

Source of the rules: InternVL, internvl_chat/internvl/conversation.py, and ``preprocess_internlm``, ``preprocess_mpt`` and
``preprocess_internvl2_5`` of internvl/train/dataset.py.
"""

from dataclasses import dataclass

OPEN, CLOSE = "<|im_start|>", "<|im_end|>"
_FIRST = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
_LATER = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One of them.

    Attributes:
        system: the line that a conversation without a system turn begins with.
        end: of a turn; what follows ``<|im_end|>`` in it is never supervised.
        strips: texts lose their outer white space.
    """

    system: str
    end: str
    strips: bool = False

    @property
    def jinja(self) -> str:
        """As a chat template of transformers, without the system line, which is a message of its own, and without BOS."""
        end, trim = self.end.replace("\n", "\\n"), " | trim" if self.strips else ""
        return (
            "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['content'] is string %}"
            f"{{{{ message['content']{trim} }}}}{{% else %}}"
            "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
            "{{ '<IMG_CONTEXT>\\n' }}{% elif content['type'] == 'video' %}{{ '<video>\\n' }}{% elif content['type'] == 'text' %}"
            f"{{{{ content['text']{trim} }}}}{{% endif %}}{{% endfor %}}{{% endif %}}{{{{ '{end}' }}}}{{% endfor %}}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
        )


PROMPTS = {
    "internvl2_5": Prompt(system=_LATER, end=f"{CLOSE}\n"),  # 2.5, 3, 3.5
    "internlm2-chat": Prompt(system=_FIRST, end=CLOSE, strips=True),  # 2 on InternLM2, and its 76B
    "Hermes-2": Prompt(system=_FIRST, end=CLOSE),  # 2 on Qwen2 and Yi
}
DEFAULT = "internvl2_5"
