"""Images of a step encoded before its schedule, on all ranks of a replica; the way back after it.

    rows --dealt by cost--> rounds of {pixels to who encodes them, tower, connector} --features--> ranks that hold their tokens
    rows with features --megatron-core's schedule--> gradients of the features --to who encoded them--> backward of both parts
    gradients of later stages' copies --sum--> the first stage's parameters --> data parallel sum and update as ever
    parameters of the first stage --broadcast, before the next rows--> copies

So a pipeline does not wait for the tower of its first stage, and rows of one image do not leave ranks without work. Copies are no
parameters of an optimizer: their state is the first stage's alone, and they are equal to it bit for bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlm.data.row import Row
from megatron_vlm.layers.context.images import ImageShare
from megatron_vlm.models.built import Model, unwrapped
from megatron_vlm.parallel.batch import deal_images, send_images

PIECE = 2**26
"""Numbers that one collective of gradients or weights takes together."""


@dataclass(kw_only=True)
class Ahead:
    """The way back from a schedule, on one rank.

    Attributes:
        share: who encoded what.
        outputs: features of own images, of each pass, with their graph.
        features: of this rank's tokens, a leaf a row; none on later stages.
    """

    share: ImageShare
    outputs: list[Tensor]
    features: list[Tensor]


def encode_ahead(model: Model, rows: Sequence[Row]) -> tuple[Row, ...]:
    """Encodes all images of ``rows``. A collective of the replica.

    Args:
        model: its towers on every stage.
        rows: of ``share_rows``.

    Returns:
        The rows, on the first stage with the features of their images. With gradients ``finish`` is to be called after them.

    Raises:
        DataError: on every rank: images have other numbers of features than a row has tokens for them.
    """
    topology, stage = model.topology, unwrapped(model.stages[0])
    _refresh(model)
    if stage.image_work is None or not any(row.pixels for row in rows):
        return tuple(rows)
    dealt = deal_images(topology, rows, stage.image_work)
    share, limit = dealt.share, sum(dealt.costs) / len(rows)
    passes = [cut_passes(images, dealt.costs, limit) for images in dealt.share.owners]
    train = torch.is_grad_enabled() and bool(stage.trained)
    outputs: list[Tensor] = []
    with gradients_of_copies(stage), torch.set_grad_enabled(train):
        for number in range(max(map(len, passes))):
            turn = [images[number] if number < len(images) else [] for images in passes]
            pixels = send_images(topology, dealt.images, turn, stage.config.params_dtype)
            if pixels:
                with stage.saved.of_a_pass():
                    outputs.append(
                        stage.own_features(pixels, [dealt.grids[i] for i in turn[share.rank] if dealt.grids])
                    )
    with torch.no_grad():
        like = torch.empty(
            0, stage.language_model.feature_size, dtype=stage.config.params_dtype, device=topology.device
        )
        received = share.exchange(torch.cat(outputs or [like]))
    features = []
    if topology.first_stage:
        features = [part.requires_grad_(train) for part in received.split(dealt.held)]
        rows = [replace(row, features=part) if row.pixels else row for row, part in zip(rows, features)]
    if train:
        stage.ahead = Ahead(share=share, outputs=outputs, features=features)
    return tuple(rows)


def finish(model: Model) -> None:
    """Brings the gradients of features back and adds those of tower and connector to the first stage's. A collective of the
    replica, before gradients are summed over data parallel ranks."""
    topology, ddp = model.topology, model.stages[0]
    stage = unwrapped(ddp)
    ahead, stage.ahead = stage.ahead, None
    if ahead is not None:
        gradients = [torch.zeros_like(part) if part.grad is None else part.grad for part in ahead.features]
        width, dtype = stage.language_model.feature_size, stage.config.params_dtype
        none = torch.empty(0, width, dtype=dtype, device=topology.device)
        gradient = ahead.share.bring_back(torch.cat(gradients or [none]))
        wide = torch.float32 if ddp.ddp_config.grad_reduce_in_fp32 else None
        sums = [torch.zeros_like(p, dtype=wide) for p in stage.trained] if stage.holds_copies else []
        with gradients_of_copies(stage), ddp.no_sync():
            while ahead.outputs:
                output = ahead.outputs.pop()
                gradient, part = gradient.split([len(gradient) - len(output), len(output)])
                torch.autograd.backward(output, part)
                _take_gradients(stage, sums)
        ddp.settle()  # a rank may have had no image: its gradients are read as zeros from here on
        if topology.pp > 1:
            sums = sums or main_gradients(stage.trained)
            sum_over(sums, topology.pp_group, to=topology.grid.source(topology.rank, "pp"))
    if ddp.ddp_config.overlap_grad_reduce and not stage.holds_copies:
        ddp.settle()
        for parameter in stage.trained:
            ddp.param_to_bucket_group[parameter].register_grad_ready(parameter)


def note_trained(model: Model) -> None:
    """Sets ``trained`` of the stages; copies on later ones are no parameters that train, to DDP and the optimizer."""
    for stage in model:
        parts = (stage.vision_model, stage.connector)
        stage.trained = [p for part in parts if part is not None for p in part.parameters() if p.requires_grad]
        if stage.holds_copies:
            for parameter in stage.trained:
                parameter.requires_grad_(False)


def cut_passes(images: Sequence[int], costs: Sequence[float], limit: float) -> list[list[int]]:
    """Images of a rank in passes of about ``limit`` work: what runs at a time takes no more memory than the images of a row."""
    found: list[list[int]] = []
    load = 0.0
    for image in images:
        if not found or load + costs[image] > limit:
            found.append([])
            load = 0.0
        found[-1].append(image)
        load += costs[image]
    return found


def main_gradients(parameters: Sequence[Any]) -> list[Tensor]:
    """DDP's sums of their gradients."""
    return [parameter.main_grad for parameter in parameters]


def sum_over(tensors: Sequence[Tensor], group: Any, to: int | None = None) -> None:
    """Sums tensors in place over the ranks of a group; ``to``: on this global rank alone."""
    for piece in _pieces(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in piece])
        dist.all_reduce(flat, group=group) if to is None else dist.reduce(flat, to, group=group)
        _spread(flat, piece)


def _refresh(model: Model) -> None:
    """Gives copies on later stages what the first stage has now. A collective of the pipeline."""
    topology, stage = model.topology, unwrapped(model.stages[0])
    if topology.pp == 1:
        return
    with torch.no_grad():
        for piece in _pieces(stage.trained):
            flat = torch.cat([parameter.reshape(-1) for parameter in piece])
            dist.broadcast(flat, topology.grid.source(topology.rank, "pp"), group=topology.pp_group)
            if stage.holds_copies:
                _spread(flat, piece)


@contextmanager
def gradients_of_copies(stage: Any) -> Iterator[None]:
    """Copies, which neither DDP nor the optimizer is to see, get gradients inside."""
    copies = stage.trained if stage.holds_copies else []
    for parameter in copies:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in copies:
            parameter.requires_grad_(False)


def _take_gradients(stage: Any, sums: Sequence[Tensor]) -> None:
    """Adds the gradients of copies to ``sums``, as DDP does to its buffers."""
    for total, parameter in zip(sums, stage.trained):
        if parameter.grad is not None:
            total += parameter.grad
            parameter.grad = None


def _pieces(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in order, in lists of one dtype that are not larger than they need be."""
    piece: list[Tensor] = []
    for tensor in tensors:
        if piece and (tensor.dtype != piece[0].dtype or sum(t.numel() for t in piece) + tensor.numel() > PIECE):
            yield piece
            piece = []
        piece.append(tensor)
    if piece:
        yield piece


def _spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(part.view(tensor.shape))
