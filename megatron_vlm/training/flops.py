"""Floating point operations of an Idefics2 step, for MFU: real tokens and the tower counted, padding and recompute not.

    images (patches each) --> tower, connector --> + segments (tokens each) --> decoder --> + supervised tokens --> head

Matrix products and attention only, two operations per multiply-add, as torch's FlopCounterMode counts; a test holds the
two equal. Model FLOPs utilisation is ``training(...) / step_seconds / peak``: what recomputing does twice counts once.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_vlm.models.idefics2.config import Idefics2ModelConfig


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of one forward pass, by trainable group."""

    vision: float
    connector: float
    llm: float

    @property
    def forward(self) -> float:
        """The whole forward pass."""
        return self.vision + self.connector + self.llm

    def training(self, frozen: Collection[str] = ()) -> float:
        """Forward and backward pass: each part costs its forward once more for the gradients of its activations, unless
        it and all before it are frozen, and once more for those of its weights, unless it is frozen.

        Args:
            frozen: names of frozen groups, out of ``vision``, ``connector``, ``llm``.
        """
        total, gradients_flow = 0.0, False
        for group in ("vision", "connector", "llm"):
            trains = group not in frozen
            gradients_flow = gradients_flow or trains
            total += getattr(self, group) * (1 + gradients_flow + trains)
        return total


def forward_flops(
    config: Idefics2ModelConfig,
    *,
    patches: Sequence[int],
    segments: Sequence[int],
    supervised: int,
    causal_half: bool = True,
) -> Flops:
    """Counts one forward pass.

    Args:
        config: the model.
        patches: patches of each image.
        segments: tokens of each sample (a packed row attends within samples only).
        supervised: positions that the head is computed on.
        causal_half: count the half of the score matrix that causal attention needs; False: all of it.
    """
    vision, perceiver, text = config.vision, config.perceiver, config.text
    total, squares = sum(patches), sum(p * p for p in patches)
    h, hv = text.hidden_size, vision.hidden_size
    tower = 2 * total * vision.num_channels * vision.patch_size**2 * hv + vision.num_layers * (
        total * (8 * hv**2 + 4 * hv * vision.ffn_hidden_size) + 4 * squares * hv
    )
    n, images = perceiver.num_latents, len(patches)
    q, kv = perceiver.num_attention_heads * perceiver.head_dim, perceiver.num_query_groups * perceiver.head_dim
    keys = total + n * images
    connector = 2 * total * (2 * hv * text.ffn_hidden_size + text.ffn_hidden_size * h) + perceiver.depth * (
        2 * n * images * h * q  # queries
        + 4 * keys * h * kv  # keys and values
        + 4 * n * keys * q  # scores and their product with the values
        + 2 * n * images * q * h  # output projection
        + 24 * n * images * h**2  # gated MLP of width 4 h
    )
    q, kv = text.num_attention_heads * text.head_dim, text.num_query_groups * text.head_dim
    window = text.sliding_window or max(segments, default=0)
    pairs = sum(_causal_pairs(s, window) if causal_half else s * s for s in segments)
    tokens = sum(segments)
    decoder = text.num_layers * (2 * tokens * (2 * h * q + 2 * h * kv + 3 * h * text.ffn_hidden_size) + 4 * pairs * q)
    head = 2 * supervised * h * text.vocab_size
    return Flops(vision=tower, connector=connector, llm=decoder + head)


def _causal_pairs(length: int, window: int) -> float:
    """Query-key pairs of one causal segment: half of the square, as is the custom, less what the window leaves out."""
    outside = max(0, length - window)
    return (length**2 - outside**2) / 2
