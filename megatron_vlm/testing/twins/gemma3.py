"""Tiny random Gemma 3 twins with tokenizer and processor, and transformers' processor of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.data.row import EncodedSample
from megatron_vlm.models.families.gemma3.reference import hf_inputs as hf_inputs
from megatron_vlm.testing.twins.common import CORPUS, noise_samples, randomise

IMAGE_MARKS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% if messages[0]['content'] is string %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% else %}{% set first = messages[0]['content'][0]['text'] + '\n\n' %}"
    "{% endif %}{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% set role = message['role'] %}"
    "{% if role == 'assistant' %}{% set role = 'model' %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}{% if message['content'] is string %}"
    "{{ message['content'] | trim }}{% else %}{% for item in message['content'] %}{% if item['type'] == 'image' %}"
    "{{ '<start_of_image>' }}{% else %}{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def tiny_tokenizer():
    """Trains a byte-level BPE tokenizer that puts BOS before a text, with Gemma's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=IMAGE_MARKS,
    )
    marks = ["<start_of_turn>", "<end_of_turn>", *IMAGE_MARKS.values()]
    fast.add_special_tokens({"additional_special_tokens": marks}, replace_extra_special_tokens=False)
    return fast


def tiny_config(tokenizer: Any, **options: Any):
    """Returns a tiny Gemma3Config; ``text`` and ``vision`` override values of those parts, ``tokens`` those of an image.

    A window of 7 tokens is shorter than the 9 of an image. Heads of 12 dimensions, scaled as if they had 20.
    """
    from transformers import Gemma3Config

    ids = tokenizer.convert_tokens_to_ids
    text = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=12,
        query_pre_attn_scalar=20,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(
        model_type="siglip_vision_model",
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=36,
        patch_size=6,
        vision_use_head=False,
    )
    config = Gemma3Config(
        text_config={**text, **options.get("text", {})},
        vision_config={**vision, **options.get("vision", {})},
        mm_tokens_per_image=options.get("tokens", 9),
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
        image_token_index=ids("<image_soft_token>"),
        tie_word_embeddings=options.get("tie", True),
    )
    config.text_config.tie_word_embeddings = config.tie_word_embeddings
    return config


def write_tiny_gemma3(directory: str | Path, *, seed: int = 0, std: float = 0.15, **options: Any):
    """Writes a checkpoint (weights, config, tokenizer, processor files) and returns the model; ``options`` of ``tiny_config``."""
    from safetensors.torch import load_file, save_file
    from transformers import Gemma3ForConditionalGeneration

    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer, **options)
    config._attn_implementation = "eager"
    model: Any = randomise(Gemma3ForConditionalGeneration(config), seed, std).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight") and "vision_tower" not in name:  # of which 1 more is taken
            parameter.data.sub_(1.0)
    model.generation_config.eos_token_id = [
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<end_of_turn>"),
    ]
    model.save_pretrained(directory)
    path, prefix = Path(directory) / "model.safetensors", "vision_tower."
    tensors = load_file(path)  # as the published files name the tower
    renamed = {
        n.replace(prefix, f"{prefix}vision_model.") if n.startswith(prefix) else n: t for n, t in tensors.items()
    }
    save_file(renamed, path, metadata={"format": "pt"})
    write_processor(directory, tokenizer, config)
    return model


def write_processor(directory: str | Path, tokenizer: Any, config: Any, **images: Any) -> None:
    """Writes tokenizer and processor files as the published models have them; ``images`` are settings of pixels."""
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    side = config.vision_config.image_size
    tokenizer.save_pretrained(directory)
    size = {"height": side, "width": side}
    Gemma3ImageProcessorPil(size=size, **images).save_pretrained(directory)
    processor = {"image_seq_length": config.mm_tokens_per_image, "processor_class": "Gemma3Processor"}
    (Path(directory) / "processor_config.json").write_text(json.dumps(processor))
    (Path(directory) / "chat_template.jinja").write_text(TEMPLATE)


def hf_processor(directory: str | Path):
    """transformers' processor of a twin."""
    from transformers import AutoTokenizer, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    directory = Path(directory)
    settings = json.loads((directory / "processor_config.json").read_text())
    return Gemma3Processor(
        Gemma3ImageProcessorPil.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
        chat_template=(directory / "chat_template.jinja").read_text(),
        image_seq_length=settings["image_seq_length"],
    )


def make_samples(config: Any, specs: Sequence[tuple[int, int]], seed: int = 0) -> list[EncodedSample]:
    """Makes samples of random tokens and noise images.

    Args:
        config: Gemma3ModelConfig.
        specs: one (number of images, number of text tokens after them) per sample.
        seed: of the numbers drawn.
    """
    image = config.image_tokens, config.expected_image(None)
    return noise_samples([([image] * images, text) for images, text in specs], config.image_token_id, seed=seed)
