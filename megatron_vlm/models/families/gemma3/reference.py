"""How Hugging Face's Gemma 3 is run beside ours for ``convert verify``: samples, inputs, and which modules correspond."""

import dataclasses

import torch
from torch import Tensor

from megatron_vlm.data.row import EncodedSample
from megatron_vlm.models.hf_reference import Probe, Reference, decoder_probes, layer_probes, random_sample


def hf_inputs(sample: EncodedSample, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """transformers' arguments for one sample; the tokens of its images are told apart by their type."""
    types = torch.zeros_like(sample.input_ids)
    types[sample.image_positions] = 1
    inputs = {"input_ids": sample.input_ids[None], "token_type_ids": types[None]}
    return inputs | ({"pixel_values": torch.stack(sample.pixels).to(dtype)} if sample.pixels else {})


class Gemma3Reference(Reference):
    """HF's side of a comparison."""

    hf_class = "Gemma3ForConditionalGeneration"

    def samples(self, seed: int = 0) -> list[EncodedSample]:
        """Random samples with no, one and two images; from the config alone."""
        generator = torch.Generator().manual_seed(seed)
        vision, image_id, any_id = self.config.vision, self.config.image_token_id, self.any_but_image(generator)

        def draw(count: int) -> list[int]:
            # transformers gives the embedding of <pad>, token 0, no gradient, which we do.
            return [token or 1 for token in any_id(count)]

        shape = (vision.num_channels, vision.image_size, vision.image_size)
        samples = []
        for number in range(3):
            sample = random_sample(f"verify{number}", draw, [self.config.image_tokens] * number, image_id, words=16)
            pixels = tuple(torch.randn(shape, generator=generator) for _ in range(number))
            samples.append(dataclasses.replace(sample, pixels=pixels))
        return samples

    def inputs(self, sample: EncodedSample, dtype: torch.dtype) -> dict[str, Tensor]:
        """HF's arguments for one sample."""
        return hf_inputs(sample, dtype)

    def probes(self) -> list[Probe]:
        """Corresponding modules, in the order of the computation."""
        layers = "encoder.layers"
        return [
            *layer_probes(f"vision_model.{layers}", f"model.vision_tower.{layers}", self.config.vision.num_layers, "patches"),
            Probe(ours="connector", theirs="model.multi_modal_projector", rows="latents"),
            *decoder_probes("model.language_model", self.config.text.num_layers),
        ]  # fmt: skip
