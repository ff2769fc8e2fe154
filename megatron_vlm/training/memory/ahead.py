"""Memory of images that are encoded before a step's schedule (training/ahead.py), on one rank.

rows of a step --deal_images, cut_passes--> passes of this rank --measure_images, without data--> held over the step, peak
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_vlm.data.row import Row
from megatron_vlm.models.built import Model
from megatron_vlm.parallel.batch import deal_images
from megatron_vlm.training.ahead import PIECE, cut_passes, gradients_of_copies
from megatron_vlm.training.memory.trace import ChunkBytes, measure_images


@dataclass(frozen=True, kw_only=True)
class AheadBytes:
    """What is held besides the schedule's own.

    Attributes:
        held: while it runs.
        peak: before and after it.
    """

    held: int
    peak: int


def ahead_bytes(model: Model, rows: Sequence[Row], device_kind: Any) -> AheadBytes:
    """Of a step of ``rows``, their pixels on meta; ``model`` as ``training.ahead.note_trained`` left it."""
    topology, stage = model.topology, model.stages[0]
    if stage.vision_model is None or not any(row.pixels for row in rows):
        return AheadBytes(held=0, peak=0)
    dealt = deal_images(topology, rows, stage.image_work)
    known: dict[tuple[torch.Size, ...], ChunkBytes] = {}
    passes = []
    for images in cut_passes(dealt.share.mine, dealt.costs, sum(dealt.costs) / len(rows)):
        shapes = tuple(dealt.images[i].shape for i in images)
        if shapes not in known:
            with gradients_of_copies(stage):
                known[shapes] = measure_images(stage, shapes, device_kind)
        passes.append(known[shapes])
    width = model.config.text.feature_size * stage.config.params_dtype.itemsize
    own, features = dealt.share.features * width, sum(dealt.held) * width if topology.first_stage else 0
    before = after = kept = 0
    for one in passes:
        before, kept = max(before, kept + one.forward), kept + one.kept
    before = max(before, kept + 2 * own + 2 * features)  # put in the order of who gets them, and back in that of tokens
    held = kept + features * (2 if stage.trained else 1)  # with their gradients
    after = held + 3 * own + features
    left = held + 2 * own + (sum(4 * p.numel() for p in stage.trained) if stage.holds_copies else 0)
    for one in reversed(passes):
        after, left = max(after, left - one.kept + one.backward), left - one.kept
    return AheadBytes(held=held, peak=max(before, after))


def bytes_of_sums(model: Model) -> int:
    """On top of what stays between steps, when gradients of a tower that is whole, or a copy, are summed over ranks."""
    stage = model.stages[0]
    if not (model.topology.whole_tower or model.topology.encodes_ahead):
        return 0
    trained = sum(parameter.numel() for parameter in stage.trained)
    return 4 * (min(trained, PIECE) + (trained if stage.holds_copies else 0))


def encoded(row: Row, model: Model) -> Row:
    """``row`` of this rank as the schedule gets it: with features in place of pixels."""
    stage = model.stages[0]
    like = dict(dtype=stage.config.params_dtype, device="meta", requires_grad=bool(stage.trained))
    features = torch.empty(len(row.image_positions), model.config.text.feature_size, **like)
    return replace(row, features=features) if row.pixels else row
