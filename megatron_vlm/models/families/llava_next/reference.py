"""How Hugging Face's LLaVA-NeXT and LLaVA-OneVision are run beside ours for ``convert verify``."""

import dataclasses

import torch
from torch import Tensor

from megatron_vlm.data.images.anyres import View
from megatron_vlm.data.row import EncodedSample
from megatron_vlm.models.families.llava_next.config import LlavaNextModelConfig
from megatron_vlm.models.hf_reference import Probe, Reference, decoder_probes, layer_probes, random_sample


def hf_inputs(sample: EncodedSample, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """HF's arguments for one sample: views of each image, padded to those of the largest, and the images' own sizes."""
    inputs = {"input_ids": sample.input_ids[None]}
    if not sample.pixels:
        return inputs
    size = sample.pixels[0].shape[2]
    views = [torch.stack(image.split(size, 1)).to(dtype) for image in sample.pixels]
    inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(views, batch_first=True)
    inputs["image_sizes"] = torch.tensor([grid[2:] for grid in sample.grids])
    if not all(grid[0] for grid in sample.grids):  # LLaVA-OneVision's several images
        inputs["batch_num_images"] = torch.tensor([len(sample.pixels)])
    return inputs


class LlavaNextReference(Reference):
    """HF's side of a comparison."""

    def __init__(self, config: LlavaNextModelConfig):
        super().__init__(config)
        self.hf_class = f"{config.kind}ForConditionalGeneration"  # type: ignore[misc]

    def samples(self, seed: int = 0) -> list[EncodedSample]:
        """Random samples of no image, of a wide and of a high one, and in LLaVA-OneVision of two; from the config alone."""
        generator = torch.Generator().manual_seed(seed)
        sizes = min(self.config.anyres.sizes, key=lambda size: size[0] * size[1])
        wide, high = self.config.anyres.view(3 * sizes[1], sizes[0]), self.config.anyres.view(sizes[1], 2 * sizes[0])
        several = [[View(0, 0, 5, 9), View(0, 0, 9, 5)]] if self.config.kind == "LlavaOnevision" else []
        return [
            self.sample(f"verify{i}", views, 16, generator) for i, views in enumerate([[], [wide], [high], *several])
        ]

    def sample(self, key: str, views: list[View], words: int, generator: torch.Generator) -> EncodedSample:
        """A random sample of these images and as many words."""
        vision, tokens = self.config.vision, [self.config.anyres.tokens(view) for view in views]
        sample = random_sample(key, self.any_but_image(generator), tokens, self.config.image_token_id, words)
        size = vision.image_size
        shapes = [(vision.num_channels, (1 + view.rows * view.columns) * size, size) for view in views]
        pixels = tuple(torch.randn(shape, generator=generator) for shape in shapes)
        return dataclasses.replace(sample, pixels=pixels, grids=tuple(views))

    def inputs(self, sample: EncodedSample, dtype: torch.dtype) -> dict[str, Tensor]:
        """HF's arguments for one sample."""
        return hf_inputs(sample, dtype)

    def probes(self) -> list[Probe]:
        """Corresponding modules, in the order of the computation; HF's connector has no module that lays lines out."""
        layers = "encoder.layers"
        return [
            *layer_probes(f"vision_model.{layers}", f"model.vision_tower.{layers}", self.config.vision.num_run_layers, "patches"),
            Probe(ours="connector.mlp", theirs="model.multi_modal_projector", rows="latents"),
            *decoder_probes("model.language_model", self.config.text.num_layers),
        ]  # fmt: skip
