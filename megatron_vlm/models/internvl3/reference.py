"""How Hugging Face's InternVL is run beside ours for ``convert verify``: samples, inputs, and which modules correspond."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vlm.data.types import EncodedSample
from megatron_vlm.models.idefics2.reference import Probe
from megatron_vlm.models.internvl3.config import InternVL3ModelConfig


def hf_inputs(sample: EncodedSample, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """transformers' arguments for one sample: the tiles of all images as one batch."""
    inputs = {"input_ids": sample.input_ids[None]}
    if sample.pixels:
        tiles = [tile for image in sample.pixels for tile in image.split(image.shape[2], 1)]
        inputs["pixel_values"] = torch.stack(tiles).to(dtype)
    return inputs


class InternVL3Reference:
    """HF's side of a comparison.

    Args:
        config: of the model.
    """

    def __init__(self, config: InternVL3ModelConfig):
        self.config = config

    def load(self, directory: Path, dtype: torch.dtype) -> nn.Module:
        """HF's model with eager attention, in ``dtype``."""
        from transformers import InternVLForConditionalGeneration
        from transformers.utils import logging

        logging.disable_progress_bar()
        model = InternVLForConditionalGeneration.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
        return model.eval()

    def samples(self, seed: int = 0) -> list[EncodedSample]:
        """Random samples with no, one and two images of one and several tiles; from the config alone."""
        generator = torch.Generator().manual_seed(seed)
        return [self._sample(f"verify{i}", tiles, generator) for i, tiles in enumerate(([], [1], [3, 1]))]

    def inputs(self, sample: EncodedSample, dtype: torch.dtype) -> dict[str, Tensor]:
        """HF's arguments for one sample."""
        return hf_inputs(sample, dtype)

    def probes(self) -> list[Probe]:
        """Corresponding modules, in the order of the computation."""
        vision, text = self.config.vision.num_layers, self.config.text.num_layers
        ours, theirs = "vision_model.encoder.layers.", "model.vision_tower.encoder.layer."
        decoder, language = "language_model.decoder.", "model.language_model."
        return [
            *(Probe(ours=f"{ours}{i}", theirs=f"{theirs}{i}", rows="patches") for i in range(vision)),
            Probe(ours="connector", theirs="model.multi_modal_projector", rows="latents"),
            *(Probe(ours=f"{decoder}layers.{i}", theirs=f"{language}layers.{i}", rows="tokens") for i in range(text)),
            Probe(ours=f"{decoder}final_layernorm", theirs=f"{language}norm", rows="tokens"),
        ]

    def real_rows(self, probe: Probe, output: Tensor, sample: EncodedSample) -> Tensor:
        """HF's output for one sample -> [rows, width]; there is no padding in it."""
        return output.reshape(-1, output.shape[-1])

    def _sample(self, key: str, images: list[int], generator: torch.Generator) -> EncodedSample:
        vision, image_id = self.config.vision, self.config.image_token_id
        assert image_id is not None  # transformers' layout says it

        def draw(count: int) -> list[int]:
            # Special tokens lie at the end. transformers gives the padding token's embedding no gradient, which we do.
            return torch.randint(0, image_id // 2, (count,), generator=generator).tolist()

        ids = draw(1)
        positions: list[int] = []
        for tiles in images:
            ids += draw(1)
            count = tiles * self.config.tile_tokens()
            positions += range(len(ids), len(ids) + count)
            ids += [image_id] * count
        ids += draw(16)
        labels = torch.tensor(ids)
        labels[positions] = -100
        size = vision.image_size
        pixels = [torch.randn(vision.num_channels, n * size, size, generator=generator) for n in images]
        tensors: dict[str, Any] = {"input_ids": torch.tensor(ids), "labels": labels, "pixels": tuple(pixels)}
        return EncodedSample(key=key, **tensors, image_positions=torch.tensor(positions, dtype=torch.int64))


def reference_of(config: InternVL3ModelConfig) -> InternVL3Reference | None:
    """HF's side, where HF has such a model: of weights in transformers' own layout."""
    return InternVL3Reference(config) if config.layout == "hf" else None
