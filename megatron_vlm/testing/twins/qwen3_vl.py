"""Tiny random Qwen3-VL twins, with tokenizer and processor; samples and inputs are made as Qwen2.5-VL's (``qwen2_5_vl.py``)."""

from pathlib import Path
from typing import Any

from megatron_vlm.testing.twins import internvl3
from megatron_vlm.testing.twins.common import randomise
from megatron_vlm.testing.twins.qwen2_5_vl import SPECIAL_TOKENS, config_fields, write_files

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|>"
    "<|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_qwen3_vl(directory: str | Path, *, seed: int = 0, std: float = 0.15, **options: Any):
    """Writes a checkpoint (weights, config, tokenizer, processor) and returns the model.

    ``text`` and ``vision`` override values of those parts, ``tie`` ties the head. The first and the last of three layers of the
    tower are levels.
    """
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = internvl3.tiny_tokenizer(special=SPECIAL_TOKENS)
    vision = {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2], **options.pop("vision", {})}
    text = {"head_dim": 12, **options.pop("text", {})}
    config = Qwen3VLConfig(**config_fields(tokenizer, [3, 2, 1], vision=vision, text=text, **options))
    config._attn_implementation = "eager"
    model: Any = randomise(Qwen3VLForConditionalGeneration(config), seed, std).eval()
    half = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    write_files(directory, model, tokenizer, TEMPLATE, **half)
    return model
