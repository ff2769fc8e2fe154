"""How Hugging Face's Idefics3 and SmolVLM are run beside ours for ``convert verify``."""

import dataclasses

import torch
from torch import Tensor

from megatron_vlm.data.row import EncodedSample
from megatron_vlm.models.families.smolvlm.config import SmolVLMModelConfig
from megatron_vlm.models.hf_reference import Probe, Reference, decoder_probes, layer_probes, random_sample


def hf_inputs(sample: EncodedSample, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """HF's arguments for one sample; every pixel of a tile is real, so that no mask is needed."""
    inputs = {"input_ids": sample.input_ids[None]}
    if sample.pixels:
        inputs["pixel_values"] = torch.stack(list(sample.pixels))[None].to(dtype)
    return inputs


class SmolVLMReference(Reference):
    """HF's side of a comparison."""

    def __init__(self, config: SmolVLMModelConfig):
        super().__init__(config)
        self.hf_class = f"{config.kind}ForConditionalGeneration"  # type: ignore[misc]

    def samples(self, seed: int = 0) -> list[EncodedSample]:
        """Random samples of no, one and three tiles; from the config alone."""
        generator = torch.Generator().manual_seed(seed)
        text, vision, tokens = self.config.text, self.config.vision, self.config.tile_tokens
        draw, size, samples = self.any_but_image(generator), vision.image_size, []
        for number, tiles in enumerate((0, 1, 3)):
            pixels = torch.rand(tiles, vision.num_channels, size, size, generator=generator) * 2 - 1
            words = max(4, min(24, text.max_position_embeddings - tiles * (tokens + 2)))
            sample = random_sample(f"verify{number}", draw, [tokens] * tiles, self.config.image_token_id, words)
            samples.append(dataclasses.replace(sample, pixels=tuple(pixels)))
        return samples

    def inputs(self, sample: EncodedSample, dtype: torch.dtype) -> dict[str, Tensor]:
        """HF's arguments for one sample."""
        return hf_inputs(sample, dtype)

    def probes(self) -> list[Probe]:
        """Corresponding modules, in the order of the computation."""
        tower = "vision_model.encoder.layers"
        return [
            *layer_probes(tower, f"model.{tower}", self.config.vision.num_layers, "patches"),
            Probe(ours="vision_model.encoder.final_layernorm", theirs="model.vision_model.post_layernorm", rows="patches"),
            Probe(ours="connector", theirs="model.connector", rows="latents"),
            *decoder_probes("model.text_model", self.config.text.num_layers),
        ]  # fmt: skip
