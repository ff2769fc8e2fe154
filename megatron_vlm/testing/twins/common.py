"""What all tiny random HF twins share: a corpus for their tokenizers, and how their weights are drawn.

Weights have a standard deviation of about 0.15: HF's default of 0.02 hides mistakes (tanh against erf GELU moves logits by
3e-7 there).
"""

import torch
from torch import nn

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
