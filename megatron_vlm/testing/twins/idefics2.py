"""A tiny Idefics2 checkpoint with tokenizer and processor, written where a test wants it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.testing.twins.common import CORPUS, randomise

SPECIAL_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{message['role'].capitalize()}}{% if message['content'][0]['type'] == 'image' %}{{':'}}"
    "{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def tiny_tokenizer(end_of_utterance: bool = True, vocab_size: int = 400, added: Sequence[str] = SPECIAL_TOKENS):
    """Trains a byte-level BPE tokenizer with Llama's and Idefics2's special tokens: ids 0-2 are <unk>, <s>, </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": list(added[: 3 if end_of_utterance else 2])})
    return fast


def tiny_idefics2_config(tokenizer, text: str = "mistral", **options: Any):
    """Returns a tiny Idefics2Config. Options override single values: ``text_hidden``, ``layers``, ``heads``, ``kv_heads``,
    ``ffn``, ``sliding_window``, ``tie``, ``vision_hidden``, ``vision_layers``, ``vision_heads``, ``vision_ffn``,
    ``image_size``, ``patch_size``, ``latents``, ``depth``, ``perceiver_heads``, ``perceiver_kv_heads``,
    ``perceiver_head_dim``, ``max_positions``, ``vocab_size``, ``rope`` (rope_parameters of a Llama)."""
    from transformers import Idefics2Config

    get = options.get
    hidden, tie = get("text_hidden", 64), get("tie", False)
    text_config = dict(
        model_type=text,
        hidden_size=hidden,
        intermediate_size=get("ffn", 96),
        num_hidden_layers=get("layers", 4),
        num_attention_heads=get("heads", 8),
        num_key_value_heads=get("kv_heads", 4),
        vocab_size=get("vocab_size", len(tokenizer)),
        max_position_embeddings=get("max_positions", 1024),
        rms_norm_eps=1e-5,
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    if text == "mistral":
        text_config["sliding_window"] = get("sliding_window")
        text_config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    else:
        text_config["rope_parameters"] = get("rope", {"rope_type": "default", "rope_theta": 500000.0})
    unknown = set(options) - {
        "text_hidden", "layers", "heads", "kv_heads", "ffn", "sliding_window", "tie", "vision_hidden", "vision_layers",
        "vision_heads", "vision_ffn", "image_size", "patch_size", "latents", "depth", "perceiver_heads",
        "perceiver_kv_heads", "perceiver_head_dim", "max_positions", "vocab_size", "rope",
    }  # fmt: skip
    if unknown:
        raise TypeError(f"unknown options of a tiny twin: {sorted(unknown)}")
    return Idefics2Config(
        text_config=text_config,
        vision_config=dict(
            hidden_size=get("vision_hidden", 48),
            intermediate_size=get("vision_ffn", 64),
            num_hidden_layers=get("vision_layers", 3),
            num_attention_heads=get("vision_heads", 4),
            image_size=get("image_size", 56),
            patch_size=get("patch_size", 8),
        ),
        perceiver_config=dict(
            hidden_size=hidden,
            resampler_n_latents=get("latents", 5),
            resampler_depth=get("depth", 2),
            resampler_n_heads=get("perceiver_heads", 4),
            num_key_value_heads=get("perceiver_kv_heads", 2),
            resampler_head_dim=get("perceiver_head_dim", 16),
            rms_norm_eps=1e-6,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=tie,
    )


def write_tiny_idefics2(
    directory: str | Path,
    text: str = "mistral",
    *,
    seed: int = 0,
    std: float = 0.15,
    end_of_utterance: bool = True,
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
    **options: Any,
):
    """Writes a whole Idefics2 checkpoint (weights, config, generation config, tokenizer, processor) and returns the model.

    Args:
        directory: where to write.
        text: ``mistral`` or ``llama``.
        seed, std: of the random weights.
        end_of_utterance: False leaves ``<end_of_utterance>`` out of the vocabulary, as the base variant does.
        max_shard_size: small values give sharded safetensors with an index.
        dtype: of the tensors on disk.
        options: as of ``tiny_idefics2_config``.
    """
    from transformers import Idefics2ForConditionalGeneration
    from transformers import Idefics2Processor as HFProcessor
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    tokenizer = tiny_tokenizer(end_of_utterance)
    config = tiny_idefics2_config(tokenizer, text, **options)
    config._attn_implementation = "eager"
    model: Any = randomise(Idefics2ForConditionalGeneration(config), seed, std).to(dtype).eval()
    if end_of_utterance:  # as in the published checkpoints
        model.generation_config.eos_token_id = [2, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[2])]
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    image_size = config.vision_config.image_size
    images = Idefics2ImageProcessorPil(
        do_image_splitting=False, size={"longest_edge": image_size, "shortest_edge": max(8, int(image_size * 0.4))}
    )
    HFProcessor(
        images, tokenizer, image_seq_len=config.perceiver_config.resampler_n_latents, chat_template=CHAT_TEMPLATE
    ).save_pretrained(directory)
    return model
