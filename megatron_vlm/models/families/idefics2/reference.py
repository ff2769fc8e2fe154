"""How Hugging Face's Idefics2 is run beside ours for ``convert verify``: samples, inputs, and which modules correspond."""

import dataclasses

import torch
from torch import Tensor

from megatron_vlm.data.row import EncodedSample
from megatron_vlm.models.hf_reference import Probe, Reference, decoder_probes, layer_probes, random_sample


def hf_inputs(sample: EncodedSample, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """HF's arguments for one sample: images padded right and below to the largest, with their mask."""
    inputs = {"input_ids": sample.input_ids[None]}
    if sample.pixels:
        height, width = _canvas(sample)
        pixels = torch.zeros(1, len(sample.pixels), sample.pixels[0].shape[0], height, width, dtype=dtype)
        mask = torch.zeros(1, len(sample.pixels), height, width, dtype=torch.int64)
        for i, image in enumerate(sample.pixels):
            pixels[0, i, :, : image.shape[1], : image.shape[2]] = image
            mask[0, i, : image.shape[1], : image.shape[2]] = 1
        inputs |= {"pixel_values": pixels, "pixel_attention_mask": mask}
    return inputs


class Idefics2Reference(Reference):
    """HF's side of a comparison."""

    hf_class = "Idefics2ForConditionalGeneration"

    def samples(self, seed: int = 0) -> list[EncodedSample]:
        """Random samples with no, one and three images of different, non-square sizes; from the config alone."""
        generator = torch.Generator().manual_seed(seed)
        text, vision, latents = self.config.text, self.config.vision, self.config.perceiver.num_latents
        patch, side, draw = vision.patch_size, vision.side, self.any_but_image(generator)
        grids: list[list[tuple[int, int]]] = [[], [(3, 5)], [(6, 2), (2, 3), (4, 4)]]
        samples = []
        for number, sizes in enumerate(grids):
            pixels = []
            for rows, columns in sizes:  # a remainder beyond the last whole patch must not matter
                shape = (min(rows, side) * patch + 1, min(columns, side) * patch)
                pixels.append(torch.rand(vision.num_channels, *shape, generator=generator) * 2 - 1)
            words = max(4, min(24, text.max_position_embeddings - len(pixels) * (latents + 2)))
            counts, key = [latents] * len(pixels), f"verify{number}"
            sample = random_sample(key, draw, counts, self.config.image_token_id, words)
            samples.append(dataclasses.replace(sample, pixels=tuple(pixels)))
        return samples

    def inputs(self, sample: EncodedSample, dtype: torch.dtype) -> dict[str, Tensor]:
        """HF's arguments for one sample."""
        return hf_inputs(sample, dtype)

    def probes(self) -> list[Probe]:
        """Corresponding modules, in the order of the computation."""
        ours, theirs = "connector.perceiver_resampler", "model.connector.perceiver_resampler"
        tower, projection = "vision_model.encoder.layers", "connector.modality_projection"
        return [
            *layer_probes(tower, f"model.{tower}", self.config.vision.num_layers, "patches"),
            Probe(ours="vision_model.encoder.final_layernorm", theirs="model.vision_model.post_layernorm", rows="patches"),
            Probe(ours=projection, theirs=f"model.{projection}", rows="patches"),
            *layer_probes(f"{ours}.layers", f"{theirs}.layers", self.config.perceiver.depth, "latents"),
            Probe(ours=f"{ours}.norm", theirs=f"{theirs}.norm", rows="latents"),
            *decoder_probes("model.text_model", self.config.text.num_layers),
        ]  # fmt: skip

    def real_rows(self, probe: Probe, output: Tensor, sample: EncodedSample) -> Tensor:
        """HF's padded output for one sample -> [rows, width] without padding."""
        if probe.rows != "patches":
            return super().real_rows(probe, output, sample)
        patch = self.config.vision.patch_size
        height, width = (size // patch for size in _canvas(sample))
        grid = output.reshape(len(sample.pixels), height, width, -1)
        real = [
            image_grid[: image.shape[1] // patch, : image.shape[2] // patch].flatten(0, 1)
            for image_grid, image in zip(grid, sample.pixels)
        ]
        return torch.cat(real)


def _canvas(sample: EncodedSample) -> tuple[int, int]:
    """Height and width of the largest of a sample's images."""
    return max(p.shape[1] for p in sample.pixels), max(p.shape[2] for p in sample.pixels)
