"""How Hugging Face's Idefics2 is run beside ours for ``convert verify``: sample batch, inputs, and which modules correspond.

Activations of both sides are brought to [rows, width]: patches of all images, latents of all images, tokens of all samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_vlm.data.types import EncodedSample
from megatron_vlm.models.idefics2.config import Idefics2ModelConfig


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A module whose output is compared: its path in our model and in HF's, and what its rows are."""

    ours: str
    theirs: str
    rows: Literal["patches", "latents", "tokens"]


class Idefics2Reference:
    """HF's side of a comparison.

    Args:
        config: of the model.
    """

    def __init__(self, config: Idefics2ModelConfig):
        self.config = config

    def load(self, directory: Path, dtype: torch.dtype) -> nn.Module:
        """HF's model with eager attention, in ``dtype``."""
        from transformers import Idefics2ForConditionalGeneration
        from transformers.utils import logging

        logging.disable_progress_bar()
        model = Idefics2ForConditionalGeneration.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
        return model.eval()

    def samples(self, seed: int = 0) -> list[EncodedSample]:
        """Random samples with no, one and three images of different, non-square sizes; from the config alone."""
        generator = torch.Generator().manual_seed(seed)
        patch, side = self.config.vision.patch_size, self.config.vision.side
        grids: list[list[tuple[int, int]]] = [[], [(3, 5)], [(6, 2), (2, 3), (4, 4)]]
        samples = []
        for number, sizes in enumerate(grids):
            pixels = []
            for rows, columns in sizes:  # a remainder beyond the last whole patch must not matter
                shape = (min(rows, side) * patch + 1, min(columns, side) * patch)
                pixels.append(torch.rand(self.config.vision.num_channels, *shape, generator=generator) * 2 - 1)
            samples.append(self._sample(f"verify{number}", pixels, generator))
        return samples

    def inputs(self, sample: EncodedSample, dtype: torch.dtype) -> dict[str, Tensor]:
        """HF's arguments for one sample: images padded right and below to the largest, with their mask."""
        inputs = {"input_ids": sample.input_ids[None]}
        if sample.pixels:
            height, width = self._canvas(sample)
            pixels = torch.zeros(1, len(sample.pixels), sample.pixels[0].shape[0], height, width, dtype=dtype)
            mask = torch.zeros(1, len(sample.pixels), height, width, dtype=torch.int64)
            for i, image in enumerate(sample.pixels):
                pixels[0, i, :, : image.shape[1], : image.shape[2]] = image
                mask[0, i, : image.shape[1], : image.shape[2]] = 1
            inputs |= {"pixel_values": pixels, "pixel_attention_mask": mask}
        return inputs

    def probes(self) -> list[Probe]:
        """Corresponding modules, in the order of the computation."""
        ours, theirs = "connector.perceiver_resampler", "model.connector.perceiver_resampler"
        tower, projection = "vision_model.encoder.layers", "connector.modality_projection"
        return [
            *_layers(tower, f"model.{tower}", self.config.vision.num_layers, "patches"),
            Probe(ours="vision_model.encoder.final_layernorm", theirs="model.vision_model.post_layernorm", rows="patches"),
            Probe(ours=projection, theirs=f"model.{projection}", rows="patches"),
            *_layers(f"{ours}.layers", f"{theirs}.layers", self.config.perceiver.depth, "latents"),
            Probe(ours=f"{ours}.norm", theirs=f"{theirs}.norm", rows="latents"),
            *_layers("language_model.decoder.layers", "model.text_model.layers", self.config.text.num_layers, "tokens"),
            Probe(ours="language_model.decoder.final_layernorm", theirs="model.text_model.norm", rows="tokens"),
        ]  # fmt: skip

    def real_rows(self, probe: Probe, output: Tensor, sample: EncodedSample) -> Tensor:
        """HF's padded output for one sample -> [rows, width] without padding."""
        if probe.rows != "patches":
            return output.reshape(-1, output.shape[-1])
        patch = self.config.vision.patch_size
        height, width = (size // patch for size in self._canvas(sample))
        grid = output.reshape(len(sample.pixels), height, width, -1)
        real = [
            image_grid[: image.shape[1] // patch, : image.shape[2] // patch].flatten(0, 1)
            for image_grid, image in zip(grid, sample.pixels)
        ]
        return torch.cat(real)

    def _sample(self, key: str, pixels: Sequence[Tensor], generator: torch.Generator) -> EncodedSample:
        text, latents, image_id = self.config.text, self.config.perceiver.num_latents, self.config.image_token_id
        words = max(4, min(24, text.max_position_embeddings - len(pixels) * (latents + 2)))

        def draw(count: int) -> list[int]:
            ids = torch.randint(0, text.vocab_size - 1, (count,), generator=generator)
            return (ids + (ids >= image_id)).tolist()  # any token but the image's

        ids = draw(1)
        positions: list[int] = []
        for _ in pixels:
            ids += draw(1)
            positions += range(len(ids), len(ids) + latents)
            ids += [image_id] * latents
        ids += draw(words)
        labels = torch.tensor(ids)
        labels[positions] = -100
        return EncodedSample(
            key=key,
            input_ids=torch.tensor(ids),
            labels=labels,
            pixels=tuple(pixels),
            image_positions=torch.tensor(positions, dtype=torch.int64),
        )

    def _canvas(self, sample: EncodedSample) -> tuple[int, int]:
        return max(p.shape[1] for p in sample.pixels), max(p.shape[2] for p in sample.pixels)


def _layers(ours: str, theirs: str, count: int, rows: Any) -> list[Probe]:
    return [Probe(ours=f"{ours}.{i}", theirs=f"{theirs}.{i}", rows=rows) for i in range(count)]
