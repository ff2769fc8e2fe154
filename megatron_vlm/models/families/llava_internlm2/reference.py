"""How Hugging Face's Llava is run beside ours for ``convert verify``: samples, inputs, and which modules correspond."""

import dataclasses

import torch
from torch import Tensor

from megatron_vlm.data.row import EncodedSample
from megatron_vlm.models.hf_reference import Probe, Reference, decoder_probes, layer_probes, random_sample


class LlavaReference(Reference):
    """HF's side of a comparison."""

    hf_class = "LlavaForConditionalGeneration"

    def samples(self, seed: int = 0) -> list[EncodedSample]:
        """Random samples with no, one and two images; from the config alone."""
        generator = torch.Generator().manual_seed(seed)
        vision, image_id, draw = self.config.vision, self.config.image_token_id, self.any_but_image(generator)
        shape = (vision.num_channels, vision.image_size, vision.image_size)
        samples = []
        for number in range(3):
            sample = random_sample(f"verify{number}", draw, [vision.side**2] * number, image_id, words=16)
            pixels = tuple(torch.randn(shape, generator=generator) for _ in range(number))
            samples.append(dataclasses.replace(sample, pixels=pixels))
        return samples

    def inputs(self, sample: EncodedSample, dtype: torch.dtype) -> dict[str, Tensor]:
        """HF's arguments for one sample."""
        inputs = {"input_ids": sample.input_ids[None]}
        return inputs | ({"pixel_values": torch.stack(sample.pixels).to(dtype)} if sample.pixels else {})

    def probes(self) -> list[Probe]:
        """Corresponding modules, in the order of the computation."""
        layers = "encoder.layers"
        return [
            *layer_probes(f"vision_model.{layers}", f"model.vision_tower.{layers}", self.config.vision.num_run_layers, "patches"),
            Probe(ours="connector", theirs="model.multi_modal_projector", rows="latents"),
            *decoder_probes("model.language_model", self.config.text.num_layers),
        ]  # fmt: skip
