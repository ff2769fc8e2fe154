"""Tiny random Qwen2.5-VL twins, with tokenizer and processor."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm import registry
from megatron_vlm.data.row import EncodedSample
from megatron_vlm.models.families.qwen2_5_vl import reference
from megatron_vlm.models.processing.mrope import mrope_positions
from megatron_vlm.testing.twins import internvl3
from megatron_vlm.testing.twins.common import noise_samples, randomise

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIXELS = (16 * 16 * 2, 16 * 16 * 24)
"""Least and most of an image of the twin."""


def tiny_config(tokenizer: Any, **options: Any):
    """Returns a tiny Qwen2_5_VLConfig; ``text`` and ``vision`` override values of those parts, ``tie`` ties the head."""
    from transformers import Qwen2_5_VLConfig

    vision = {"window_size": 32, "fullatt_block_indexes": [1], **options.pop("vision", {})}
    return Qwen2_5_VLConfig(**config_fields(tokenizer, [1, 2, 1], vision=vision, **options))


def config_fields(tokenizer: Any, sections: Sequence[int], **options: Any) -> dict[str, Any]:
    """What the tiny configs of Qwen's families share, with ``sections`` of M-RoPE; ``options`` as of ``tiny_config``."""
    ids = tokenizer.convert_tokens_to_ids
    text = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": sections},
        bos_token_id=None,
        eos_token_id=ids("<|im_end|>"),
        pad_token_id=ids("<|endoftext|>"),
    )
    vision = dict(
        depth=3,
        hidden_size=48,
        intermediate_size=60,
        num_heads=4,
        patch_size=8,
        out_hidden_size=64,
    )
    marks = {name: ids(f"<|{name}|>") for name in ("vision_start", "vision_end", "image_pad", "video_pad")}
    return dict(
        text_config={**text, **options.get("text", {})},
        vision_config={**vision, **options.get("vision", {})},
        image_token_id=marks["image_pad"],
        video_token_id=marks["video_pad"],
        vision_start_token_id=marks["vision_start"],
        vision_end_token_id=marks["vision_end"],
        tie_word_embeddings=options.get("tie", False),
    )


def write_tiny_qwen2_5_vl(directory: str | Path, *, seed: int = 0, std: float = 0.15, **options: Any):
    """Writes a checkpoint (weights, config, tokenizer, processor) and returns the model."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    tokenizer = internvl3.tiny_tokenizer(special=SPECIAL_TOKENS)
    config = tiny_config(tokenizer, **options)
    config._attn_implementation = "eager"
    model: Any = randomise(Qwen2_5_VLForConditionalGeneration(config), seed, std).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("ln_q.weight"):  # a norm by another name
            parameter.data.add_(1.0)
    write_files(directory, model, tokenizer, TEMPLATE)
    return model


def write_files(directory: str | Path, model: Any, tokenizer: Any, template: str, **images: Any) -> None:
    """Writes a model with tokenizer and processor; ``images``: settings of its image processor."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.save_pretrained(directory)
    vision, size = model.config.vision_config, {"shortest_edge": PIXELS[0], "longest_edge": PIXELS[1]}
    sides = dict(patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)
    Qwen2VLImageProcessorPil(size=size, **sides, **images).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (Path(directory) / "chat_template.jinja").write_text(template)


def hf_processor(directory: str | Path, name: str = "Qwen2_5_VLProcessor"):
    """transformers' processor of a twin; without its video processor, which needs torchvision."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    kind: Any = getattr(transformers, name)

    class ImagesOnly(kind):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)

    images = Qwen2VLImageProcessorPil.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return ImagesOnly(images, tokenizer, chat_template=(Path(directory) / "chat_template.jinja").read_text())


def inputs_of(hf_config: dict[str, Any]) -> Callable[..., dict[str, Tensor]]:
    """``inputs(sample, dtype)``: transformers' arguments for a sample of the model of ``hf_config``, of any family of Qwen's."""
    config: Any = registry.get(hf_config["model_type"]).config(hf_config)
    return functools.partial(reference.hf_inputs, config)


def make_samples(
    config: Any, specs: Sequence[tuple[Sequence[Sequence[Any]], int]], seed: int = 0
) -> list[EncodedSample]:
    """Makes samples of random tokens, noise images and videos.

    Args:
        config: of the family.
        specs: of each sample what is seen, and the number of text tokens after it. An image is (rows, columns of blocks), a video
            (rows, columns, pairs of frames, seconds of a pair).
        seed: of the numbers drawn.
    """
    unit, made = config.vision.unit, []
    for seen, num_text in specs:
        shapes = []
        for rows, wide, *video in seen:
            shape = (rows * unit, wide * unit)
            tokens = rows * wide * (video[0] if video else 1)
            shapes.append((tokens, (video[0], 6, *shape) if video else (3, *shape)))
        made.append((shapes, num_text))
    samples = noise_samples(made, config.image_token_id, seed=seed)
    return [_with_videos(config, sample, seen) for sample, (seen, _) in zip(samples, specs)]


def _with_videos(config: Any, sample: EncodedSample, seen: Sequence[Sequence[Any]]) -> EncodedSample:
    """Splits the pixels of videos into pairs of frames, marks their tokens, and counts positions by their seconds."""
    ids, pixels, place = sample.input_ids.clone(), [], 0
    grids, intervals = [], []
    for (rows, wide, *video), noise in zip(seen, sample.pixels):
        pairs, seconds = video or (1, 1.0)
        held = sample.image_positions[place : (place := place + rows * wide * pairs)]
        if video:
            ids[held] = config.video_token_id
        pixels += list(noise) if video else [noise]
        grids.append((pairs, rows, wide))
        intervals.append(config.tokens_per_second * seconds if video else 1.0)
    images = torch.zeros(len(ids), dtype=torch.bool)
    images[sample.image_positions] = True
    return dataclasses.replace(
        sample,
        input_ids=ids,
        pixels=tuple(pixels),
        position_ids=mrope_positions(images, grids, intervals),
    )
