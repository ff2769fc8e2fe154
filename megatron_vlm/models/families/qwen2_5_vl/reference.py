"""How Hugging Face's Qwen2.5-VL is run beside ours for ``convert verify``: samples, inputs, and which modules correspond."""

import dataclasses

import torch
from torch import Tensor

from megatron_vlm.data.row import EncodedSample
from megatron_vlm.models.hf_reference import Probe, Reference, decoder_probes, layer_probes, random_sample
from megatron_vlm.models.parts.qwen_vit import QwenVLConfig
from megatron_vlm.models.processing.mrope import mrope_positions


def hf_inputs(config: QwenVLConfig, sample: EncodedSample, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """transformers' arguments for one sample: patches block by block, flat. Positions are given where it has videos.

    Of a video transformers would ask for the seconds of a pair of frames, which the sample has as positions alone.
    """
    ids, block = sample.input_ids, config.vision.block
    kinds = (ids == config.image_token_id).int() + 2 * (ids == getattr(config, "video_token_id", -1)).int()
    inputs = {"input_ids": ids[None], "mm_token_type_ids": kinds[None]}
    found: dict[int, tuple[list[Tensor], list[list[int]]]] = {1: ([], []), 2: ([], [])}
    place, last = 0, -1
    for image in sample.pixels:
        rows, columns = image.shape[1] // config.vision.unit, image.shape[2] // config.vision.unit
        first = int(sample.image_positions[place])
        kind = int(kinds[first])
        patches, grids = found[kind]
        patches.append(_patches(config, image))
        if kind == 2 and first == last + 1:  # another pair of a video
            grids[-1][0] += 1
        else:
            grids.append([1, rows * block, columns * block])
        place += rows * columns
        last = int(sample.image_positions[place - 1])
    for (patches, grids), names in zip(found.values(), (("pixel_values", "image"), ("pixel_values_videos", "video"))):
        if patches:
            inputs |= {names[0]: torch.cat(patches).to(dtype), f"{names[1]}_grid_thw": torch.tensor(grids)}
    if found[2][0]:
        inputs["position_ids"] = sample.position_ids[:, None]
    return inputs


def _patches(config: QwenVLConfig, image: Tensor) -> Tensor:
    """[C, H, W] of an image, or [2 C, H, W] of two frames -> [patches, C * 2 * p * p]."""
    vision = config.vision
    frames = image.unflatten(0, (-1, vision.num_channels)).expand(vision.temporal_patch_size, -1, -1, -1)
    cut = frames.unflatten(2, (-1, vision.block, vision.patch_size)).unflatten(
        -1, (-1, vision.block, vision.patch_size)
    )
    return cut.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(-1, vision.patch_numbers)


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
