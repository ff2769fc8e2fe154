"""How Hugging Face's InternVL is run beside ours for ``convert verify``: samples, inputs, and which modules correspond."""

import dataclasses

import torch
from torch import Tensor

from megatron_vlm.data.row import EncodedSample
from megatron_vlm.models.families.internvl3.config import InternVL3ModelConfig
from megatron_vlm.models.hf_reference import Probe, Reference, decoder_probes, layer_probes, random_sample


def hf_inputs(sample: EncodedSample, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """transformers' arguments for one sample: the tiles of all images as one batch."""
    inputs = {"input_ids": sample.input_ids[None]}
    if sample.pixels:
        tiles = [tile for image in sample.pixels for tile in image.split(image.shape[2], 1)]
        inputs["pixel_values"] = torch.stack(tiles).to(dtype)
    return inputs


class InternVL3Reference(Reference):
    """HF's side of a comparison."""

    hf_class = "InternVLForConditionalGeneration"

    def samples(self, seed: int = 0) -> list[EncodedSample]:
        """Random samples with no, one and two images of one and several tiles; from the config alone."""
        generator = torch.Generator().manual_seed(seed)
        image_id, channels, size = (
            self.config.image_token_id,
            self.config.vision.num_channels,
            self.config.vision.image_size,
        )

        def draw(count: int) -> list[int]:
            # Special tokens lie at the end. transformers gives the padding token's embedding no gradient, which we do.
            return torch.randint(0, image_id // 2, (count,), generator=generator).tolist()

        samples = []
        for number, tiles in enumerate(([], [1], [3, 1])):
            counts = [n * self.config.tile_tokens() for n in tiles]
            sample = random_sample(f"verify{number}", draw, counts, image_id, words=16)
            pixels = tuple(torch.randn(channels, n * size, size, generator=generator) for n in tiles)
            samples.append(dataclasses.replace(sample, pixels=pixels))
        return samples

    def inputs(self, sample: EncodedSample, dtype: torch.dtype) -> dict[str, Tensor]:
        """HF's arguments for one sample."""
        return hf_inputs(sample, dtype)

    def probes(self) -> list[Probe]:
        """Corresponding modules, in the order of the computation."""
        ours, theirs = "vision_model.encoder.layers", "model.vision_tower.encoder.layer"
        return [
            *layer_probes(ours, theirs, self.config.vision.num_layers, "patches"),
            Probe(ours="connector", theirs="model.multi_modal_projector", rows="latents"),
            *decoder_probes("model.language_model", self.config.text.num_layers),
        ]


def reference_of(config: InternVL3ModelConfig) -> InternVL3Reference | None:
    """HF's side, where HF has such a model: of weights in transformers' own layout."""
    return InternVL3Reference(config) if config.layout == "hf" else None
