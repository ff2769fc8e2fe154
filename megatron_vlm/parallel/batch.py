"""What each rank of a model replica receives, and how an error on one rank reaches all of them.

source rank (tp 0, stage 0): loader --> rows --did any replica fail?--> every rank raises the same error, or
    texts   one int64 tensor, broadcast over the replica at the start of a step: every stage needs positions and labels
    pixels  to the ranks that encode them: of a row, inside the forward step, or of all rows before it (training/ahead.py)
    tokens  under context parallelism each rank takes its own of the row (layers/context/), when it moves to the device

Rows on ranks without the pixels carry meta tensors of the right shapes, so the number and sizes of images are known
everywhere.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.data.row import Row, pack_pixels, unpack_pixels
from megatron_vlm.errors import DataError, MegatronVLMError
from megatron_vlm.layers.attention import to_device
from megatron_vlm.layers.context.attention import Deal, all_to_all
from megatron_vlm.layers.context.images import ImageParts, ImageShare, holders, share_images
from megatron_vlm.parallel.host import copy_stream
from megatron_vlm.parallel.topology import Topology

ImageWork = Callable[[tuple[int, ...], tuple[int, ...]], ImageParts]
"""Shape of an image, and its numbers in ``Row.grids`` -> how it is dealt."""


def raise_together(error: BaseException | None, device: torch.device) -> None:
    """Raises on every rank of the job if any rank brings an error; returns on every rank otherwise. A collective.

    The rank that failed raises its own error; the others raise the same class with the same message, marked as an
    ``echo`` so that the command line prints it once.
    """
    world = dist.get_world_size()
    failed = torch.tensor([world if error is None else dist.get_rank()], device=_told_on(device))
    dist.all_reduce(failed, dist.ReduceOp.MIN)
    source = int(failed)
    if source == world:
        return
    text = json.dumps([type(error).__name__, str(error)]) if dist.get_rank() == source else ""
    kind, message = json.loads(_broadcast_bytes(text.encode(), source, None, _told_on(device)))
    if error is not None:
        error.echo = dist.get_rank() != source  # type: ignore[attr-defined]
        raise error
    classes = {cls.__name__: cls for cls in MegatronVLMError.__subclasses__()}
    known = kind in classes
    echo = classes[kind](message) if known else MegatronVLMError(f"rank {source} failed: {kind}: {message}")
    echo.echo = True  # type: ignore[attr-defined]
    raise echo


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Runs a block of local work; if it fails on any rank, every rank raises (see ``raise_together``). A collective."""
    error: BaseException | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    raise_together(error, device)


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank if ``flag`` is on at least one. A collective."""
    tensor = torch.tensor([int(flag)], device=_told_on(device))
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return bool(tensor)


def share_rows(
    topology: Topology, rows: Sequence[Row] | None, extra: Any, error: BaseException | None
) -> tuple[tuple[Row, ...], Any]:
    """Gives the rows of a replica's source rank, without pixels, to all its ranks. A collective of the whole job.

    Args:
        topology: the layout.
        rows: this replica's rows on its source rank (``topology.replica_source``); None elsewhere.
        extra: JSON data that travels along, from the source rank.
        error: what stopped the source rank from making the rows.

    Returns:
        The rows and ``extra``. On the source rank the rows keep their pixels; elsewhere these are meta tensors.

    Raises:
        MegatronVLMError: on every rank, where any replica's source brings an error.
    """
    if error is None and rows is None and topology.is_source:
        error = DataError("the source rank of a replica has no rows")
    raise_together(error, topology.device)
    if topology.replica_size == 1:
        assert rows is not None
        return tuple(rows), extra
    source, group, device = topology.replica_source, topology.replica_group, _told_on(topology.device)
    if topology.rank == source:
        assert rows is not None
        packed = [row.pack() for row in rows]
        sizes = [len(numbers) for _, numbers in packed]
        header = {"rows": [header for header, _ in packed], "sizes": sizes, "extra": extra}
        numbers = torch.cat([numbers for _, numbers in packed]) if packed else torch.empty(0, dtype=torch.int64)
        _broadcast_bytes(json.dumps(header).encode(), source, group, device)
        if rows:
            dist.broadcast(numbers.to(device), source, group=group)
        return tuple(rows), extra
    header = json.loads(_broadcast_bytes(b"", source, group, device))
    flat = torch.empty(sum(header["sizes"]), dtype=torch.int64, device=device)
    if header["rows"]:
        dist.broadcast(flat, source, group=group)
    parts = flat.cpu().split(header["sizes"])
    return tuple(Row.unpack(*packed) for packed in zip(header["rows"], parts)), header["extra"]


def device_batch(
    topology: Topology,
    row: Row,
    *,
    pixels: bool,
    dtype: torch.dtype,
    work: ImageWork | None = None,
    whole: bool = False,
) -> Row:
    """Moves a row, or this rank's tokens of it, to the device; with ``pixels``, a collective of the first stage's ranks.

    Args:
        topology: the layout.
        row: one of ``share_rows``.
        pixels: the model chunk holds the vision tower.
        dtype: of the tower's parameters, in which pixels travel.
        work: of images, where ranks may share them.
        whole: every context parallel rank takes the whole row (generation, where a row has one token per answer).
    """
    pixels = pixels and row.features is None
    if not whole:
        row = own_tokens(topology, row, work if pixels else None)
    if row.share is not None:
        pixels_here = send_images(topology, row.pixels, row.share.owners, dtype)
        row = replace(row, pixels=pixels_here, grids=tuple(row.grids[i] for i in row.share.mine if row.grids))
    elif pixels and topology.grid.size("tp", "cp") > 1 and row.pixels:
        row = replace(row, pixels=_share_pixels(topology, row, dtype))
    with _travelling(topology.device) as arrived:
        row = row.to(topology.device, dtype, pixels=pixels)
        part = row.part[:1] if row.part else ()
        arrived += (*row.tokens.values(), row.cu_seqlens, row.loss_positions, row.image_positions, *part, *row.pixels)
    return row


@contextmanager
def _travelling(device: torch.device) -> Iterator[list[torch.Tensor]]:
    """Copies of a block to the device go through a stream that waits for nothing, so that a row travels while the one before it
    is at work; what the block puts into the list is for the current stream, which waits for the copies."""
    arrived: list[torch.Tensor] = []
    stream = copy_stream(device, "rows")
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        yield arrived
    if stream is None:
        return
    torch.cuda.current_stream().wait_stream(stream)
    for tensor in arrived:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream())


def _packed(pixels: Sequence[torch.Tensor], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Images of the host as one flat tensor on the device."""
    if not pixels:
        return torch.empty(0, dtype=dtype, device=device)
    with _travelling(device) as arrived:
        arrived.append(pack_pixels([to_device(image, device, dtype) for image in pixels]))
    return arrived[0]


def own_tokens(topology: Topology, row: Row, work: ImageWork | None = None) -> Row:
    """This context parallel rank's tokens of a row; the row itself without context parallelism.

    With ``work`` and images it also says which of them each rank encodes; its pixels are still all of the row's, in parts.

    Raises:
        DataError: images have other numbers of features than the row has tokens for them.
    """
    own = row
    if topology.cp > 1:
        deal = _deal(topology, row)
        own = row.slice(deal.index, deal)
    if work is None or not topology.shares_images or not row.pixels:
        return own
    dealt = deal_images(topology, [row], work)
    return replace(own, pixels=tuple(dealt.images), grids=dealt.grids, share=dealt.share)


@dataclass(frozen=True, kw_only=True, eq=False)
class DealtImages:
    """Images of rows over the ranks of ``Topology.image_group``.

    Attributes:
        images: of all rows, in the parts that are dealt; meta tensors where the rows' are.
        grids: of all rows, an image that has some being dealt whole.
        costs: work of each.
        held: features of each row whose tokens this rank's context parallel rank holds.
        share: who encodes which.
    """

    images: list[torch.Tensor]
    grids: tuple[tuple[int, ...], ...]
    costs: list[float]
    held: list[int]
    share: ImageShare


def deal_images(topology: Topology, rows: Sequence[Row], work: ImageWork) -> DealtImages:
    """Deals the images of rows, which every rank of the replica knows alike.

    Raises:
        DataError: images have other numbers of features than the rows have tokens for them.
    """
    images: list[torch.Tensor] = []
    counts: list[int] = []
    costs: list[float] = []
    holder: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    ordered = True
    for row in rows:
        tokens = 0
        for image, grid in zip(row.pixels, row.grids or repeat(())):
            parts = work(tuple(image.shape), grid)
            features = parts.number * parts.features
            order = torch.arange(features) if parts.tokens is None else parts.tokens
            sources.append(order + sum(counts))
            tokens, ordered = tokens + len(order), ordered and parts.tokens is None
            images += parts.cut(image)
            counts += [parts.features] * parts.number
            costs += [parts.work] * parts.number
        if tokens != len(row.image_positions):
            raise DataError(
                f"a row of {len(row.pixels)} images gives {tokens} image features for "
                f"{len(row.image_positions)} image tokens: the processor and the model disagree on the tokens of an image "
                f"(samples {', '.join(row.keys[:20])})"
            )
        cp_rank = torch.zeros(len(row.image_positions), dtype=torch.int64)
        holder.append(holders(_deal(topology, row), row.image_positions) if topology.cp > 1 else cp_rank)
    share = share_images(
        counts,
        costs,
        torch.cat(holder),
        size=topology.grid.size(*topology.image_axes),
        rank=topology.grid.number(topology.rank, *topology.image_axes),
        group=topology.image_group,
        device=topology.device,
        copies=topology.tp if "tp" in topology.image_axes else 1,
        source=None if ordered else torch.cat(sources),
    )
    held = [int((ranks == topology.cp_rank).sum()) for ranks in holder]
    grids = tuple(grid for row in rows for grid in row.grids)
    return DealtImages(images=images, grids=grids, costs=costs, held=held, share=share)


def _deal(topology: Topology, row: Row) -> Deal:
    return Deal(row.starts, topology.cp, topology.cp_rank, topology.cp_group, topology.device, topology.exchange)


def send_images(
    topology: Topology, images: Sequence[torch.Tensor], owners: Sequence[Sequence[int]], dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """The images that this rank encodes, each sent by the source to who encodes it alone. A collective of who may.

    Args:
        topology: the layout.
        images: [C, h, w] each on the source; elsewhere meta tensors of these shapes.
        owners: which of them each rank of ``topology.image_group`` encodes.
        dtype: in which they travel.
    """
    axes = topology.image_axes
    sizes = [sum(images[i].numel() for i in numbers) for numbers in owners]
    rank = topology.grid.number(topology.rank, *axes)
    mine = [images[i].shape for i in owners[rank]]
    flat = torch.empty(sizes[rank], dtype=dtype, device=topology.device)
    split = (
        "tp" not in axes and topology.tp > 1
    )  # tensor parallel ranks encode the same images, each its part of the tower
    if not split or topology.tp_rank == 0:
        reads = topology.is_source
        order = [i for numbers in owners for i in numbers]
        packed = _packed([images[i] for i in order] if reads else (), dtype, topology.device)
        receives = [len(flat) if number == 0 else 0 for number in range(len(owners))]
        flat = all_to_all(packed, sizes if reads else [0] * len(owners), receives, topology.image_group)
    if split and mine:
        dist.broadcast(flat, topology.grid.source(topology.rank, "tp"), group=topology.tp_group)
    return unpack_pixels(flat, mine)


def _share_pixels(topology: Topology, row: Row, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    shapes, source = [p.shape for p in row.pixels], topology.replica_source
    if topology.rank == source:
        flat = _packed(row.pixels, dtype, topology.device)
    else:
        flat = torch.empty(sum(shape.numel() for shape in shapes), dtype=dtype, device=topology.device)
    dist.broadcast(flat, source, group=topology.stage_group)
    return unpack_pixels(flat, shapes)


def _told_on(device: torch.device) -> torch.device:
    """Where what ranks tell each other lies: beside a GPU on the host, so that to read it is no wait for a step at work."""
    return torch.device("cpu") if device.type == "cuda" else device


def _broadcast_bytes(data: bytes, source: int, group: Any, device: torch.device) -> bytes:
    """Sends bytes from rank ``source`` to the ranks of ``group`` (None: all)."""
    mine = dist.get_rank() == source
    size = torch.tensor([len(data)], device=device)
    dist.broadcast(size, source, group=group)
    payload = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device) if mine else None
    if payload is None:
        payload = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(payload, source, group=group)
    return payload.cpu().numpy().tobytes()
