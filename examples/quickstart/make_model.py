"""Writes a tiny untrained Idefics2 as a whole HF checkpoint: weights, config, tokenizer, processor, chat template.

1.5 M parameters: a 3-layer tower on 32 x 32 pixels (16 patches), 8 perceiver latents, a 4-layer Mistral of width 128.
"""

import argparse
from pathlib import Path

import torch
from transformers import Idefics2ForConditionalGeneration, Idefics2Processor
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

from megatron_vlm.testing.twins.idefics2 import CHAT_TEMPLATE, tiny_idefics2_config, tiny_tokenizer

SIZE = 32
# The default of 0.02 suits wide models. At width 128 it leaves every sublayer's output tiny beside the residual, all
# images look alike to the decoder, and training sits on a plateau for hundreds of steps.
INIT_STD = 0.07


def build(tokenizer, seed: int) -> Idefics2ForConditionalGeneration:
    """Returns the model as transformers initialises it, with ``INIT_STD``."""
    config = tiny_idefics2_config(
        tokenizer,
        text_hidden=128, ffn=256, layers=4, heads=4, kv_heads=2, max_positions=1024,
        vision_hidden=96, vision_ffn=192, vision_layers=3, vision_heads=4, image_size=SIZE, patch_size=8,
        latents=8, depth=2, perceiver_heads=4, perceiver_kv_heads=2, perceiver_head_dim=32,
    )  # fmt: skip
    for part in (config, config.text_config, config.vision_config, config.perceiver_config):
        part.initializer_range = INIT_STD
    torch.manual_seed(seed)
    model = Idefics2ForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def main() -> None:
    """Writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = tiny_tokenizer()
    model = build(tokenizer, args.seed)
    model.save_pretrained(args.out)
    images = Idefics2ImageProcessorPil(do_image_splitting=False, size={"longest_edge": SIZE, "shortest_edge": SIZE})
    latents = model.config.perceiver_config.resampler_n_latents
    Idefics2Processor(images, tokenizer, image_seq_len=latents, chat_template=CHAT_TEMPLATE).save_pretrained(args.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
