"""How Hugging Face's Qwen2.5-VL is run beside ours for ``convert verify``: samples, inputs, and which modules correspond."""

import dataclasses

import torch
from torch import Tensor

from megatron_vlm.data.row import EncodedSample
from megatron_vlm.models.hf_reference import Probe, Reference, decoder_probes, layer_probes, random_sample
from megatron_vlm.models.parts.qwen_vit import QwenVLConfig
from megatron_vlm.models.processing.mrope import mrope_positions


def hf_inputs(config: QwenVLConfig, sample: EncodedSample, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """transformers' arguments for one sample: patches block by block, flat; positions are left to transformers."""
    inputs = {"input_ids": sample.input_ids[None]}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == config.image_token_id).int()
    if sample.pixels:
        vision, patches, grids = config.vision, [], []
        for image in sample.pixels:
            rows, columns = image.shape[1] // vision.unit, image.shape[2] // vision.unit
            cut = image.view(-1, rows, vision.block, vision.patch_size, columns, vision.block, vision.patch_size)
            cut = cut.permute(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None].expand(
                *(-1,) * 5, vision.temporal_patch_size, -1, -1
            )
            patches.append(cut.reshape(-1, vision.patch_numbers))
            grids.append([1, rows * vision.block, columns * vision.block])
        inputs |= {"pixel_values": torch.cat(patches).to(dtype), "image_grid_thw": torch.tensor(grids)}
    return inputs


def with_positions(sample: EncodedSample, unit: int) -> EncodedSample:
    """A sample of images with the three positions of each token; ``unit``: pixels of a side of a block."""
    images = torch.zeros(len(sample.input_ids), dtype=torch.bool)
    images[sample.image_positions] = True
    grids = [(1, p.shape[1] // unit, p.shape[2] // unit) for p in sample.pixels]
    return dataclasses.replace(sample, position_ids=mrope_positions(images, grids))


class Qwen25VLReference(Reference):
    """HF's side of a comparison."""

    hf_class = "Qwen2_5_VLForConditionalGeneration"

    @property
    def side(self) -> int:
        """Blocks along a side of what images are larger than: a window."""
        return self.config.vision.window

    def samples(self, seed: int = 0) -> list[EncodedSample]:
        """Random samples with no, one and two images, some larger than a window; from the config alone."""
        generator = torch.Generator().manual_seed(seed)
        vision, image_id = self.config.vision, self.config.image_token_id

        def draw(count: int) -> list[int]:
            # Special tokens lie at the end. transformers gives the padding token's embedding no gradient, which we do.
            return torch.randint(0, image_id // 2, (count,), generator=generator).tolist()

        samples = []
        for number, grids in enumerate(([], [(2, 3)], [(self.side + 1, 2), (1, 2 * self.side + 1)])):
            sample = random_sample(f"verify{number}", draw, [rows * wide for rows, wide in grids], image_id, words=16)
            sizes = [(vision.num_channels, rows * vision.unit, wide * vision.unit) for rows, wide in grids]
            pixels = tuple(torch.randn(size, generator=generator) for size in sizes)
            samples.append(with_positions(dataclasses.replace(sample, pixels=pixels), vision.unit))
        return samples

    def inputs(self, sample: EncodedSample, dtype: torch.dtype) -> dict[str, Tensor]:
        """HF's arguments for one sample."""
        return hf_inputs(self.config, sample, dtype)

    def probes(self) -> list[Probe]:
        """Corresponding modules, in the order of the computation."""
        tower = layer_probes(
            "vision_model.encoder.layers", "model.visual.blocks", self.config.vision.num_layers, "patches"
        )
        # The last module of the merger on HF's side gives features in the order of the windows: they are compared as fused.
        return [*tower, *decoder_probes("model.language_model", self.config.text.num_layers)]
