"""How Hugging Face's Llava is run beside ours for ``convert verify``: samples, inputs, and which modules correspond."""

from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_vlm.data.types import EncodedSample
from megatron_vlm.models.idefics2.reference import Probe
from megatron_vlm.models.llava_internlm2.config import LlavaModelConfig


class LlavaReference:
    """HF's side of a comparison.

    Args:
        config: of the model.
    """

    def __init__(self, config: LlavaModelConfig):
        self.config = config

    def load(self, directory: Path, dtype: torch.dtype) -> nn.Module:
        """HF's model with eager attention, in ``dtype``."""
        from transformers import LlavaForConditionalGeneration
        from transformers.utils import logging

        logging.disable_progress_bar()
        model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
        return model.eval()

    def samples(self, seed: int = 0) -> list[EncodedSample]:
        """Random samples with no, one and two images; from the config alone."""
        generator = torch.Generator().manual_seed(seed)
        return [self._sample(f"verify{number}", number, generator) for number in range(3)]

    def inputs(self, sample: EncodedSample, dtype: torch.dtype) -> dict[str, Tensor]:
        """HF's arguments for one sample."""
        inputs = {"input_ids": sample.input_ids[None]}
        return inputs | ({"pixel_values": torch.stack(sample.pixels).to(dtype)} if sample.pixels else {})

    def probes(self) -> list[Probe]:
        """Corresponding modules, in the order of the computation."""
        ours, theirs = "vision_model.encoder.layers.", "model.vision_tower.encoder.layers."
        decoder, language = "language_model.decoder.", "model.language_model."
        layers, text = range(self.config.vision.num_run_layers), range(self.config.text.num_layers)
        return [
            *(Probe(ours=f"{ours}{i}", theirs=f"{theirs}{i}", rows="patches") for i in layers),
            Probe(ours="connector", theirs="model.multi_modal_projector", rows="latents"),
            *(Probe(ours=f"{decoder}layers.{i}", theirs=f"{language}layers.{i}", rows="tokens") for i in text),
            Probe(ours=f"{decoder}final_layernorm", theirs=f"{language}norm", rows="tokens"),
        ]

    def real_rows(self, probe: Probe, output: Tensor, sample: EncodedSample) -> Tensor:
        """HF's output for one sample -> [rows, width]; there is no padding in it."""
        return output.reshape(-1, output.shape[-1])

    def _sample(self, key: str, num_images: int, generator: torch.Generator) -> EncodedSample:
        vision, image_id = self.config.vision, self.config.image_token_id

        def draw(count: int) -> list[int]:
            ids = torch.randint(0, self.config.text.vocab_size - 1, (count,), generator=generator)
            return (ids + (ids >= image_id)).tolist()  # any token but the image's

        ids, positions = draw(1), list[int]()
        for _ in range(num_images):
            ids += draw(1)
            positions += range(len(ids), len(ids) + vision.side**2)
            ids += [image_id] * vision.side**2
        ids += draw(16)
        labels = torch.tensor(ids)
        labels[positions] = -100
        shape = (vision.num_channels, vision.image_size, vision.image_size)
        return EncodedSample(
            key=key,
            input_ids=torch.tensor(ids),
            labels=labels,
            pixels=tuple(torch.randn(shape, generator=generator) for _ in range(num_images)),
            image_positions=torch.tensor(positions, dtype=torch.int64),
        )
