"""transformers' greedy answers to conversations, through its own processor."""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

NEW = 8


@functools.cache
def _model(directory: str):
    from transformers import AutoModelForImageTextToText, Idefics2Processor

    return (
        Idefics2Processor.from_pretrained(directory),
        AutoModelForImageTextToText.from_pretrained(directory, attn_implementation="eager"),
    )


def hf_answer(directory: Path, turns: Sequence[tuple[str, str]], image: Path | None = None) -> str:
    """The first tokens of the answer to a conversation, of which the first user turn may show a picture."""
    processor, model = _model(str(directory))
    messages = []
    for role, text in turns:
        shows, text = text.startswith("<image>"), text.removeprefix("<image>")
        content = [{"type": "image"}] * shows + [{"type": "text", "text": text}]
        messages.append({"role": role, "content": content})
    asked = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=asked, images=[Image.open(image)] if image else None, return_tensors="pt")
    stop = processor.tokenizer.convert_tokens_to_ids(["<end_of_utterance>", "</s>"])
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=stop, pad_token_id=0)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
