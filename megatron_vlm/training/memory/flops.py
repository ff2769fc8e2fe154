"""Floating point operations of a step of any family, for MFU: real tokens and the tower counted, padding and recompute not.

    images (sizes) --> tower, connector --> + segments (tokens each) --> decoder --> + supervised tokens --> head
    what the index counts of samples --> the same, an entry for each, without looking at one

Matrix products and attention only, two operations per multiply-add, as torch's FlopCounterMode counts; a test holds the
two equal. The counter is no replacement: it counts the whole score matrix and no kernel for packed rows, and wants the model
built, while the images of every row are dealt to ranks by what they cost (models/family_config.py). Model FLOPs utilisation
is ``training(...) / step_seconds / peak``: what recomputing does twice counts once.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.config import DataConfig
from megatron_vlm.models.family_config import FamilyConfig, has_tower
from megatron_vlm.models.parts.decoder import TextConfig
from megatron_vlm.models.processing.image_cost import mean_pairs, tower_flops, tower_operations

Amount = Any
"""A number, or float64 [samples]."""


def passes_of(frozen: Collection[str] = (), adapted: Collection[str] = ()) -> dict[str, int]:
    """Passes over each group in a step: its forward, once more for the gradients of its activations, unless it and all
    before it are frozen, and once more for those of its weights, unless it is frozen.

    Args:
        frozen: names of frozen groups, out of ``vision``, ``connector``, ``llm``.
        adapted: those of them that gradients flow to all the same, for adapters, whose own operations do not count.
    """
    found, gradients_flow = {}, False
    for group in ("vision", "connector", "llm"):
        trains = group not in frozen
        gradients_flow = gradients_flow or trains or group in adapted
        found[group] = 1 + gradients_flow + trains
    return found


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of one forward pass, by trainable group: numbers, or arrays with an entry for each sample.

    Attributes:
        vision, connector, llm: of the whole group.
        head, attention: of ``llm``, those of the head, and those of queries on keys.
    """

    vision: Amount
    connector: Amount
    llm: Amount
    head: Amount = 0.0
    attention: Amount = 0.0

    @property
    def forward(self) -> Amount:
        """The whole forward pass."""
        return self.vision + self.connector + self.llm

    def training(self, frozen: Collection[str] = (), adapted: Collection[str] = ()) -> Amount:
        """Forward and backward pass; ``frozen`` and ``adapted`` as of ``passes_of``."""
        return sum(getattr(self, group) * passes for group, passes in passes_of(frozen, adapted).items())

    def mean(self, rows: float) -> "Flops":
        """Of one of ``rows`` rows that hold these samples."""
        return Flops(**{name: float(np.sum(value)) / rows for name, value in vars(self).items()})


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
    costs = [config.image_cost(image) for image in images] if has_tower(config) else []
    pairs = sum(_layer_pairs(config.text, s) if causal_half else s * s for s in segments)
    if config.text.image_blocks:
        pairs += sum(cost.features**2 for cost in costs) / (2 if causal_half else 1)
    return Flops(
        vision=tower_flops(config.vision, costs) if has_tower(config) else 0.0,
        connector=sum(cost.connector for cost in costs),
        **_decoder(config, sum(segments), pairs, supervised),
    )


def counted_flops(config: FamilyConfig, data: DataConfig, counts: NDArray[Any]) -> Flops:
    """Counts one forward pass of each sample by what the index knows of it.

    The images of a sample are taken to be as large as they may be where the tower sees them whole: tokens of features tell how
    many there are, at least one. Several small ones count as one of their size.

    Args:
        config: the model's configuration.
        data: what is let through.
        counts: ``COUNT_DTYPE`` [samples].
    """
    names = ("tokens", "supervised", "image_tokens", "patches")
    tokens, supervised, features, patches = (counts[name].astype(np.float64) for name in names)
    attended = _layer_pairs(config.text, tokens)
    if not has_tower(config):
        decoder = _decoder(config, tokens, attended, supervised)
        return Flops(vision=0.0 * tokens, connector=0.0 * tokens, **decoder)
    largest = config.image_cost(config.expected_image(data))
    if config.text.image_blocks:
        attended = attended + features * largest.features / 2
    decoder = _decoder(config, tokens, attended, supervised)
    views = len(largest.segments)
    if views > 1:  # equal squares, whose features depend on the image's shape
        segments = patches * (views / largest.patches)
    else:
        segments = features / largest.features
        segments = np.where(features > 0, np.maximum(segments, 1), 0)  # smaller than the largest is no part of an image
    seen = patches + segments * ((sum(largest.segments) - largest.patches) / len(largest.segments))  # class tokens
    within = seen * (sum(n * n for n in largest.windows) / sum(largest.segments))
    pairs = mean_pairs(config.vision, seen**2 / np.maximum(segments, 1e-9), within)
    return Flops(
        vision=tower_operations(config.vision, patches, seen, pairs),
        connector=patches * (largest.connector / largest.patches),
        **decoder,
    )


def _decoder(config: FamilyConfig, tokens: Amount, pairs: Amount, supervised: Amount) -> dict[str, Amount]:
    """``llm`` and its parts, of tokens, pairs of query and key, and positions that the head is computed on."""
    text = config.text
    h, q, kv = text.hidden_size, text.num_attention_heads * text.head_dim, text.num_query_groups * text.head_dim
    linears = 2 * tokens * (2 * h * q + 2 * h * kv + 3 * h * text.ffn_hidden_size) + _branches(config, tokens)
    head, attention = 2 * supervised * h * text.vocab_size, text.num_layers * 4 * pairs * q
    return {"llm": text.num_layers * linears + attention + head, "head": head, "attention": attention}


def _branches(config: FamilyConfig, tokens: Amount) -> Amount:
    """Partial LoRA of a layer, where the family has it: every token goes through the branches, then the mask."""
    rank = getattr(config, "plora_rank", 0)
    text = config.text
    h, f, q = text.hidden_size, text.ffn_hidden_size, text.num_attention_heads * text.head_dim
    kv = text.num_query_groups * text.head_dim
    qkv, projection, gate_up, down = h + q + 2 * kv, q + h, 2 * h + 2 * f, f + h
    return 2.0 * tokens * rank * (qkv + projection + gate_up + down)


def _layer_pairs(text: TextConfig, length: Amount) -> Amount:
    """Query-key pairs of one causal segment, the mean of layers with and without the window."""
    full = len(text.full_layers) / text.num_layers
    pairs = _causal_pairs(length, text.sliding_window or np.inf)
    return pairs if not full else full * _causal_pairs(length, np.inf) + (1 - full) * pairs


def _causal_pairs(length: Amount, window: float) -> Amount:
    """Query-key pairs of one causal segment: half of the square, as is the custom, less what the window leaves out."""
    return (length**2 - np.maximum(0, length - window) ** 2) / 2
