"""Floating point operations of a step of any family, for MFU: real tokens and the tower counted, padding and recompute not.

    images (sizes) --> tower, connector --> + segments (tokens each) --> decoder --> + supervised tokens --> head

Matrix products and attention only, two operations per multiply-add, as torch's FlopCounterMode counts; a test holds the
two equal. The counter is no replacement: it counts the whole score matrix and no kernel for packed rows, and wants the model
built, while the images of every row are dealt to ranks by what they cost (models/family_config.py). Model FLOPs utilisation
is ``training(...) / step_seconds / peak``: what recomputing does twice counts once.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_vlm.models.family_config import FamilyConfig, has_tower
from megatron_vlm.models.processing.image_cost import tower_flops


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

    def training(self, frozen: Collection[str] = (), adapted: Collection[str] = ()) -> float:
        """Forward and backward pass: each part costs its forward once more for the gradients of its activations, unless
        it and all before it are frozen, and once more for those of its weights, unless it is frozen.

        Args:
            frozen: names of frozen groups, out of ``vision``, ``connector``, ``llm``.
            adapted: those of them that gradients flow to all the same, for adapters, whose own operations do not count.
        """
        return self.of_groups(frozen, ("vision", "connector", "llm"), adapted)

    def of_groups(self, frozen: Collection[str], groups: Collection[str], adapted: Collection[str] = ()) -> float:
        """As ``training``, of some parts of the model alone."""
        total, gradients_flow = 0.0, False
        for group in ("vision", "connector", "llm"):
            trains = group not in frozen
            gradients_flow = gradients_flow or trains or group in adapted
            total += getattr(self, group) * (1 + gradients_flow + trains) if group in groups else 0.0
        return total


def forward_flops(
    config: FamilyConfig,
    *,
    images: Sequence[tuple[int, int, int]] = (),
    segments: Sequence[int],
    supervised: int,
    causal_half: bool = True,
) -> Flops:
    """Counts one forward pass.

    Args:
        config: the model's configuration, of any family.
        images: [C, H, W] of each image as the tower gets it (InternVL: a column of tiles).
        segments: tokens of each sample (a packed row attends within samples only).
        supervised: positions that the head is computed on.
        causal_half: count the half of the score matrix that causal attention needs; False: all of it.
    """
    text, tokens = config.text, sum(segments)
    costs = [config.image_cost(image) for image in images] if has_tower(config) else []
    h, q, kv = text.hidden_size, text.num_attention_heads * text.head_dim, text.num_query_groups * text.head_dim
    window = text.sliding_window or max(segments, default=0)
    pairs = sum(_causal_pairs(s, window) if causal_half else s * s for s in segments)
    decoder = text.num_layers * (2 * tokens * (2 * h * q + 2 * h * kv + 3 * h * text.ffn_hidden_size) + 4 * pairs * q)
    branches = text.num_layers * _branches(config, tokens)
    return Flops(
        vision=tower_flops(config.vision, costs) if has_tower(config) else 0.0,
        connector=sum(cost.connector for cost in costs),
        llm=decoder + branches + 2 * supervised * h * text.vocab_size,
    )


def _branches(config: FamilyConfig, tokens: int) -> float:
    """Partial LoRA of a layer, where the family has it: every token goes through the branches, then the mask."""
    rank = getattr(config, "plora_rank", 0)
    text = config.text
    h, f, q = text.hidden_size, text.ffn_hidden_size, text.num_attention_heads * text.head_dim
    kv = text.num_query_groups * text.head_dim
    qkv, projection, gate_up, down = h + q + 2 * kv, q + h, 2 * h + 2 * f, f + h
    return 2.0 * tokens * rank * (qkv + projection + gate_up + down)


def _causal_pairs(length: int, window: int) -> float:
    """Query-key pairs of one causal segment: half of the square, as is the custom, less what the window leaves out."""
    outside = max(0, length - window)
    return (length**2 - outside**2) / 2
