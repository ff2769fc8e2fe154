"""What all tiny random HF twins share: a corpus for their tokenizers, how their weights are drawn, and samples of noise.

Weights have a standard deviation of about 0.15: HF's default of 0.02 hides mistakes (tanh against erf GELU moves logits by
3e-7 there).
"""

from collections.abc import Sequence

import torch
from torch import nn

from megatron_vlm.data.row import IGNORE_INDEX, EncodedSample

CORPUS = (
    "User: What digit is this? Assistant: seven. zero one two three four five six seven eight nine\n"
    "Describe the picture in detail. A small grey scan of a handwritten digit on a dark ground.\n"
    "How many cats are there? There are two cats and a dog sleeping on the sofa beside the window.\n"
)


def randomise(model: nn.Module, seed: int = 0, std: float = 0.15) -> nn.Module:
    """Draws every parameter anew: N(0, std), norm weights and latents around 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        mean = 1.0 if ("norm" in name and name.endswith("weight")) or name.endswith("latents") else 0.0
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        parameter.data.copy_(mean + std * noise)
    return model


def noise_samples(
    specs: Sequence[tuple[Sequence[tuple[int, tuple[int, ...]]], int]],
    image_token_id: int,
    *,
    seed: int = 0,
    prompt: int = 0,
    below: int = 256,
) -> list[EncodedSample]:
    """Makes samples of random tokens and noise images.

    Args:
        specs: of each sample the (tokens, shape of the pixels) of each image, and the number of text tokens after them.
        image_token_id: of the tokens of an image.
        seed: of the numbers drawn.
        prompt: leading tokens, beside the first, that carry no label.
        below: text tokens are of 3 to this.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for number, (images, num_text) in enumerate(specs):
        ids: list[int] = [1]
        positions: list[int] = []
        for count, _ in images:
            ids += torch.randint(3, below, (2,), generator=generator).tolist()
            positions += range(len(ids), len(ids) + count)
            ids += [image_token_id] * count
        ids += torch.randint(3, below, (num_text,), generator=generator).tolist()
        labels = torch.tensor(ids)
        labels[: prompt + 1] = IGNORE_INDEX
        labels[positions] = IGNORE_INDEX
        samples.append(
            EncodedSample(
                key=f"sample{number}",
                input_ids=torch.tensor(ids),
                labels=labels,
                pixels=tuple(torch.randn(shape, generator=generator) for _, shape in images),
                image_positions=torch.tensor(positions, dtype=torch.int64),
            )
        )
    return samples
