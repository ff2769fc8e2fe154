"""Tiny towers and language models of every kind that ``convert assemble`` joins, each as its folder is published."""

from pathlib import Path
from typing import Any

from megatron_vlm.testing.twins.common import randomise
from megatron_vlm.testing.twins.idefics2 import tiny_tokenizer
from megatron_vlm.testing.twins.internlm2 import write_tiny_internlm2
from megatron_vlm.testing.twins.llava_internlm2 import write_tiny_clip

TOWERS = ("clip", "siglip", "internvit")
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "internlm2")


def write_tiny_tower(directory: Path, kind: str) -> None:
    """Writes a vision tower, one of ``TOWERS``."""
    if kind == "clip":
        write_tiny_clip(directory)
        return
    from transformers import InternVLVisionConfig, InternVLVisionModel, SiglipVisionConfig, SiglipVisionModel

    sizes: dict[str, Any] = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    model: Any
    if kind == "siglip":
        model = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=56, patch_size=8))
    else:
        model = InternVLVisionModel(
            InternVLVisionConfig(**sizes, image_size=(32, 32), patch_size=(8, 8), attention_bias=True)
        )
    randomise(model)
    model.save_pretrained(directory)


def write_tiny_llm(directory: Path, kind: str) -> None:
    """Writes a language model, one of ``DECODERS``, with a tokenizer: Qwen's has no BOS and marks turns."""
    directory.mkdir(parents=True, exist_ok=True)
    if kind == "internlm2":
        write_tiny_internlm2(directory)
        return
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    backend = tiny_tokenizer(added=()).backend_tokenizer
    if kind.startswith("qwen"):
        from tokenizers.processors import ByteLevel

        backend.post_processor = ByteLevel(trim_offsets=False)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None
        )
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    config = AutoConfig.for_model(
        kind, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=len(tokenizer), max_position_embeddings=1024, rms_norm_eps=1e-5, head_dim=8, sliding_window=None,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=kind == "qwen2",
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config)
    randomise(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
