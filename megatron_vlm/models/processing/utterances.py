"""The prompt of Idefics2 and its successors: ``User: TEXT<end_of_utterance>\\nAssistant: TEXT<end_of_utterance>\\n``.

A turn that begins with an image has no space before it.
"""

from pathlib import Path
from typing import Any

from megatron_vlm.errors import ConfigError
from megatron_vlm.models.processing.chat_template import chat_template, render

IMAGE = "<image>"
FAKE = "<fake_token_around_image>"
END = "<end_of_utterance>"
_PROBE = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
]


def written_first(hf_dir: Path, tokenizer: Any, family: str, *known: str) -> str | None:
    """What the chat template of a folder writes before the first turn, one of ``known``; None: it has no template.

    Raises:
        ConfigError: it writes something else, or turns in another way.
    """
    template = chat_template(hf_dir)
    if template is None:
        return None
    text, turns = (
        render(template, _PROBE, hf_dir, **tokenizer.special_tokens_map),
        f"User:{IMAGE}a{END}\nAssistant: b{END}\n",
    )
    if text not in [first + turns for first in known]:
        raise ConfigError(
            f"{hf_dir} has a chat template that is not {family}'s: it makes {text!r}, not {known[-1] + turns!r}"
        )
    return text.removesuffix(turns)
