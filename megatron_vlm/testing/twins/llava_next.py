"""Tiny random twins of LLaVA-NeXT and LLaVA-OneVision with tokenizer and processor, and transformers' processors of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.data.images.anyres import View
from megatron_vlm.data.row import EncodedSample
from megatron_vlm.models.families.llava_next.reference import LlavaNextReference
from megatron_vlm.models.families.llava_next.reference import hf_inputs as hf_inputs
from megatron_vlm.testing.twins.common import randomise
from megatron_vlm.testing.twins.idefics2 import tiny_tokenizer
from megatron_vlm.testing.twins.llava_internlm2 import CLIP, LLAMA

SIDE = CLIP["image_size"]
SIZES = {
    "LlavaNext": [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)],  # rows and columns, as published
    "LlavaOnevision": [(rows, columns) for rows in range(1, 5) for columns in range(1, 5)],
}
_FIRST = "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
_TEXT = "{% endfor %}{# Render all text next #}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
_SYSTEM = "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
TEMPLATES = {  # what the published folders' make of questions and answers
    "llama": "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    + _FIRST + "{{ '<image>\n' }}" + _TEXT
    + "{{ content['text'] + ' '}}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "mistral": "{% for message in messages %}{% if message['role'] == 'system' %}" + _SYSTEM
    + "{% elif message['role'] == 'user' %}{{ '[INST] ' }}" + _FIRST + "{{ '<image>\n' }}" + _TEXT
    + "{{ content['text'] }}{% endfor %}{{ ' [/INST]' }}{% else %}{{ ' ' + message['content'][0]['text'] + '</s>' }}"
    "{% endif %}{% endfor %}",
    "qwen2": "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}" + _FIRST + "{{ '<image>' }}" + _TEXT
    + "{{ '\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}  # fmt: skip


def write_tiny_llava_next(
    directory: str | Path,
    kind: str = "LlavaNext",
    *,
    seed: int = 0,
    std: float = 0.15,
    tie: bool = False,
    **options: Any,
):
    """Writes a checkpoint as transformers saves it (weights, config, tokenizer, processor files) and returns the model.

    Args:
        directory: where to write.
        kind: ``LlavaNext`` (CLIP; Llama, or what ``text`` says) or ``LlavaOnevision`` (SigLIP and Qwen2).
        seed, std: of the random weights.
        tie: the head is the embedding.
        options: ``text`` and ``vision`` override values of these parts, ``config`` of the whole.
    """
    import transformers

    one = kind == "LlavaOnevision"
    tokenizer = tiny_tokenizer(added=("<image>", "<|im_start|>", "<|im_end|>"))
    ids = dict(
        zip(("image", "start", "end"), tokenizer.convert_tokens_to_ids(["<image>", "<|im_start|>", "<|im_end|>"]))
    )
    if one:
        tokenizer.bos_token, tokenizer.eos_token = None, "<|im_end|>"
        tokenizer.backend_tokenizer.post_processor = None
    text: dict[str, Any] = {
        **LLAMA,
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": tie,
        "max_position_embeddings": 2048,
    }
    text |= dict(model_type="qwen2", eos_token_id=ids["end"]) if one else {}
    text |= options.get("text", {})
    vision = {**CLIP, **options.get("vision", {})}
    tower = (
        dict(model_type="siglip_vision_model", vision_use_head=False) if one else dict(model_type="clip_vision_model")
    )
    side = vision["image_size"]
    sizes = [[rows * side, columns * side] for rows, columns in SIZES[kind]]
    config = getattr(transformers, f"{kind}Config")(
        text_config=text,
        vision_config={**vision, **tower},
        image_token_index=ids["image"],
        vision_feature_layer=-1 if one else -2,
        image_grid_pinpoints=sizes,
        tie_word_embeddings=tie,
        **({"vision_aspect_ratio": "anyres_max_4"} if one else {}),
        **options.get("config", {}),
    )
    config._attn_implementation = "eager"
    model: Any = randomise(getattr(transformers, f"{kind}ForConditionalGeneration")(config), seed, std).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    write_processor(directory, tokenizer, config, TEMPLATES[text["model_type"]])
    return model


def write_processor(directory: str | Path, tokenizer: Any, config: Any, template: str | None) -> None:
    """Writes tokenizer and processor files as the published models have them."""
    kind, side = type(config).__name__.removesuffix("Config"), config.vision_config.image_size
    one, directory = kind == "LlavaOnevision", Path(directory)
    tokenizer.save_pretrained(directory)
    square = {"height": side, "width": side}
    settings: dict[str, Any] = dict(size=square) if one else dict(size={"shortest_edge": side}, crop_size=square)
    settings |= dict(image_mean=[0.5] * 3, image_std=[0.5] * 3) if one else {}
    image_processor(kind, image_grid_pinpoints=config.image_grid_pinpoints, **settings).save_pretrained(directory)
    patch = config.vision_config.patch_size
    processor: dict[str, Any] = dict(processor_class=f"{kind}Processor")
    processor |= (
        dict(
            num_image_tokens=(side // patch) ** 2,
            vision_feature_select_strategy="full",
            vision_aspect_ratio=config.vision_aspect_ratio,
        )
        if one
        else dict(patch_size=patch, num_additional_image_tokens=1, vision_feature_select_strategy="default")
    )
    (directory / "processor_config.json").write_text(json.dumps(processor))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)


def image_processor(kind: str, **settings: Any):
    """transformers' image processor of a kind, without torchvision."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    return {"LlavaNext": LlavaNextImageProcessorPil, "LlavaOnevision": LlavaOnevisionImageProcessorPil}[kind](
        **settings
    )


def hf_processor(directory: str | Path, kind: str):
    """transformers' processor of a twin, LLaVA-OneVision's without its video processor, which needs torchvision."""
    from transformers import AutoTokenizer, LlavaNextProcessor, LlavaOnevisionProcessor

    class ImagesOnly(LlavaOnevisionProcessor):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)

    directory = Path(directory)
    settings = json.loads((directory / "processor_config.json").read_text())
    settings.pop("processor_class")
    return {"LlavaNext": LlavaNextProcessor, "LlavaOnevision": ImagesOnly}[kind](
        image_processor(kind, **json.loads((directory / "preprocessor_config.json").read_text())),
        AutoTokenizer.from_pretrained(directory),
        chat_template=(directory / "chat_template.jinja").read_text(),
        **settings,
    )


def make_samples(
    config: Any, specs: Sequence[tuple[Sequence[tuple[int, int]] | int, int]], seed: int = 0
) -> list[EncodedSample]:
    """Makes samples of random tokens and noise images.

    Args:
        config: LlavaNextModelConfig.
        specs: (width, height) of each image, or how many there are, and the tokens of text after them, of each sample.
        seed: of the numbers drawn.
    """
    generator, side = torch.Generator().manual_seed(seed), config.vision.image_size
    reference, samples = LlavaNextReference(config), []
    for number, (sizes, words) in enumerate(specs):
        if isinstance(sizes, int):
            sizes = [(side, 2 * side - 9 + i % 3) if i % 2 else (3 * side, side - 5) for i in range(sizes)]
        apart = config.kind == "LlavaOnevision" and len(sizes) > 1
        views = [View(0, 0, high, wide) if apart else config.anyres.view(wide, high) for wide, high in sizes]
        samples.append(reference.sample(f"sample{number}", views, words, generator))
    return samples
