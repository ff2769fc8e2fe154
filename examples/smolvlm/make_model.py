"""Writes a SmolVLM around real published weights: SmolLM2-135M-Instruct as decoder, a small tower and a connector that are new.

    SmolLM2-135M-Instruct.Q4_1.gguf --transformers--> decoder, tokenizer --+ the tokens of images--> OUT, a whole HF checkpoint

The decoder is that of SmolVLM-256M, in the 4 bits that the file holds. The rows of added tokens start at the mean of all others.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, SmolVLMConfig, SmolVLMForConditionalGeneration

from megatron_vlm.testing.twins.smolvlm import write_processor

SIDE, PATCH, SHUFFLE, MOST = (
    64,
    8,
    4,
    2,
)  # a tile of 64 pixels is 8 x 8 patches and 4 tokens; images of up to 2 x 2 tiles
TOWER = dict(hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=3)


def tokenizer_of(gguf: Path) -> Any:
    """Returns the file's tokenizer with SmolVLM's special tokens at its end."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    places = [f"<row_{row}_col_{column}>" for row in range(1, MOST + 1) for column in range(1, MOST + 1)]
    added = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *places]
    tokenizer.add_special_tokens({"additional_special_tokens": added, "eos_token": "<end_of_utterance>"})
    return tokenizer


def around(decoder: Any, tokenizer: Any, seed: int) -> SmolVLMForConditionalGeneration:
    """Returns the model: the decoder's weights as they are, the rest as transformers initialises it."""
    text = decoder.config.to_dict()
    text.pop("quantization_config", None)
    config = SmolVLMConfig(
        text_config={**text, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
        vision_config=dict(image_size=SIDE, patch_size=PATCH, initializer_range=0.05, **TOWER),
        scale_factor=SHUFFLE,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = SmolVLMForConditionalGeneration(config)
    weights = decoder.model.state_dict()
    known = weights["embed_tokens.weight"]
    weights["embed_tokens.weight"] = torch.cat(
        [known, known.mean(0, keepdim=True).expand(len(tokenizer) - len(known), -1)]
    )
    model.model.text_model.load_state_dict(weights)
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def main() -> None:
    """Writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = tokenizer_of(args.gguf)
    decoder = AutoModelForCausalLM.from_pretrained(args.gguf.parent, gguf_file=args.gguf.name, dtype=torch.float32)
    model = around(decoder, tokenizer, args.seed)
    model.save_pretrained(args.out)
    write_processor(args.out, tokenizer, model.config, MOST, do_image_splitting=False)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
