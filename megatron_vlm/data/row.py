"""A row: whole samples laid end to end, one microbatch. Its fields are written out here and nowhere else.

    EncodedSample  one sample as the model sees it: token ids with every image expanded, labels, positions, normalised pixels
    Row            samples end to end --pack--> header and one flat tensor (workers, broadcast) --unpack--> Row --to--> device

Shapes: T tokens of a row, L tokens of a sample, N segments of a row. ``[..., T]``: any leading dimensions, such as three
positions a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """One sample as the model sees it.

    Attributes:
        key: name of the sample.
        input_ids: int64 [L], image placeholders expanded to their final number of tokens.
        labels: int64 [L], aligned with ``input_ids`` as in HF (not shifted); -100 where no loss is taken.
        position_ids: int64 [..., L]; by default 0 to L - 1.
        pixels: one floating point tensor per image, normalised, each of its own size ([C, H, W], or what the tower takes).
        grids: whole numbers of each image that its pixels do not show, where the tower needs some; empty: none does.
        image_positions: int64 [sum of image tokens], indices into ``input_ids`` that image features overwrite, in order.
        more: further per-token tensors [..., L] of whole numbers, by name; 0 over filler.
    """

    key: str
    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor = None  # type: ignore[assignment]
    pixels: tuple[Tensor, ...] = ()
    grids: tuple[tuple[int, ...], ...] = ()
    image_positions: Tensor = field(default_factory=_none)
    more: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.position_ids is None:
            object.__setattr__(self, "position_ids", torch.arange(len(self.input_ids)))


@dataclass(frozen=True, kw_only=True)
class Row:
    """The unit of work, on the host or on the device.

    Attributes:
        tokens: per-token tensors [..., T] of whole numbers, by name: ``input_ids``; ``position_ids``, as each sample has them;
            ``labels``, SHIFTED: ``labels[t]`` is the token to predict at position t, -100 where no loss is taken (always at the
            last position of a segment and over filler); and what families add.
        starts: starts of the segments, and T at the end: N + 1 numbers that no kernel launch waits for.
        cu_seqlens: int32 [N + 1], the same.
        loss_positions: int64 [num_supervised], positions whose label is not -100.
        pixels: one tensor per image of the row; meta tensors where the row is without them.
        grids: as in EncodedSample.
        image_positions: int64, indices into ``input_ids`` that image features overwrite, in order of ``pixels``.
        runs: [first, end) of tokens of images that follow one another within a sample, known on the host; of a slice, the row's.
        keys: one per real sample.
        num_filler: tokens of the filler segment at the end (0: none).
        holes: samples of the plan that could not be read.
        truncated: samples that the too-long policy shortened.
        part: of a slice, one rank's tokens of a row: which of the row's image features its ``image_positions`` take, int64 [n],
            and how many features the row has; None: all of a whole row's.
        deal: of a slice, the tokens of all ranks and how they meet (layers.context.attention.Deal).
        share: of a slice, who encodes which image (layers.context.images.ImageShare): ``pixels`` are this rank's images alone,
            and their features are exchanged for those of its image tokens; None: every rank encodes all.
        features: [n, H], of a row whose images were encoded before (training/ahead.py), those of this rank's image tokens.
    """

    tokens: Mapping[str, Tensor]
    starts: tuple[int, ...]
    cu_seqlens: Tensor
    loss_positions: Tensor
    pixels: tuple[Tensor, ...] = ()
    grids: tuple[tuple[int, ...], ...] = ()
    image_positions: Tensor = field(default_factory=_none)
    runs: tuple[tuple[int, int], ...] = ()
    keys: tuple[str, ...] = ()
    num_filler: int = 0
    holes: int = 0
    truncated: int = 0
    part: tuple[Tensor, int] | None = None
    deal: Any = None
    share: Any = None
    features: Tensor | None = None

    @classmethod
    def of(cls, tokens: Mapping[str, Tensor], segments: Sequence[int], **rest: Any) -> "Row":
        """Makes a row of tokens and the lengths of its segments."""
        starts = (0, *accumulate(segments))
        return cls(
            tokens=tokens,
            starts=starts,
            cu_seqlens=torch.tensor(starts, dtype=torch.int32),
            loss_positions=(tokens["labels"] != IGNORE_INDEX).nonzero()[:, 0],
            runs=_runs(rest.get("image_positions", _none()), starts),
            **rest,
        )

    @property
    def input_ids(self) -> Tensor:
        """int64 [T]."""
        return self.tokens["input_ids"]

    @property
    def position_ids(self) -> Tensor:
        """int64 [..., T]."""
        return self.tokens["position_ids"]

    @property
    def labels(self) -> Tensor:
        """int64 [T], shifted."""
        return self.tokens["labels"]

    @property
    def segments(self) -> tuple[int, ...]:
        """Lengths of the segments, filler's included."""
        return tuple(b - a for a, b in pairwise(self.starts))

    @property
    def num_tokens(self) -> int:
        """Real tokens: filler does not count."""
        return self.starts[-1] - self.num_filler

    @property
    def num_supervised(self) -> int:
        """Tokens that a loss is taken on."""
        return len(self.loss_positions)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None, *, pixels: bool = True) -> "Row":
        """The row on a device.

        Args:
            device: where to.
            dtype: of the pixels there; None: theirs.
            pixels: False leaves the images behind, as meta tensors (stages without the tower).
        """

        locks = torch.device(device).type == "cuda"  # only from page-locked memory does a copy not wait

        def move(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
            return (tensor.pin_memory() if locks and tensor.is_cpu else tensor).to(device, dtype, non_blocking=True)

        return replace(
            self,
            tokens={name: move(tensor) for name, tensor in self.tokens.items()},
            cu_seqlens=move(self.cu_seqlens),
            loss_positions=move(self.loss_positions),
            image_positions=move(self.image_positions),
            part=self.part and (move(self.part[0]), self.part[1]),
            pixels=tuple(move(p, dtype) if pixels else p.to("meta", dtype) for p in self.pixels),
        )

    def pack(self) -> tuple[dict[str, Any], Tensor]:
        """Returns plain data and one int64 tensor, without the pixels: what ``unpack`` makes the row of again."""
        header = {
            "tokens": {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in self.tokens.items()},
            "segments": self.segments,
            "image_positions": len(self.image_positions),
            "images": [[list(p.shape), str(p.dtype).removeprefix("torch.")] for p in self.pixels],
            "grids": self.grids,
            "keys": self.keys,
            "facts": [self.num_filler, self.holes, self.truncated],
        }
        parts = [*self.tokens.values(), self.image_positions]
        return header, torch.cat([part.reshape(-1).to(torch.int64) for part in parts])

    @classmethod
    def unpack(cls, header: Mapping[str, Any], numbers: Tensor, pixels: Tensor | None = None) -> "Row":
        """Makes the row again.

        Args:
            header, numbers: from ``pack``; JSON may lie between.
            pixels: from ``pack_pixels``; None: the images are meta tensors of their shapes.
        """
        shapes = [(name, torch.Size(shape), getattr(torch, dtype)) for name, (shape, dtype) in header["tokens"].items()]
        *parts, positions = numbers.split([*(shape.numel() for _, shape, _ in shapes), header["image_positions"]])
        images = [(torch.Size(shape), getattr(torch, dtype)) for shape, dtype in header["images"]]
        filler, holes, truncated = header["facts"]
        return cls.of(
            {name: part.view(shape).to(dtype) for (name, shape, dtype), part in zip(shapes, parts)},
            header["segments"],
            pixels=tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in images)
            if pixels is None
            else unpack_pixels(pixels, [shape for shape, _ in images]),
            grids=tuple(map(tuple, header["grids"])),
            image_positions=positions,
            keys=tuple(header["keys"]),
            num_filler=filler,
            holes=holes,
            truncated=truncated,
        )

    def slice(self, index: Tensor, deal: Any = None) -> "Row":
        """One rank's tokens of a row that several ranks share: those at int64 [n], ascending, of a ``deal``.

        Positions of losses and images count among these tokens; segments, images and keys are still the whole row's.
        """
        place = torch.full((self.starts[-1],), -1)
        place[index] = torch.arange(len(index))
        image_positions = place[self.image_positions]
        held = (image_positions >= 0).nonzero()[:, 0]
        tokens = {name: tensor.index_select(-1, index) for name, tensor in self.tokens.items()}
        return replace(
            self,
            tokens=tokens,
            loss_positions=(tokens["labels"] != IGNORE_INDEX).nonzero()[:, 0],
            image_positions=image_positions[held],
            part=(held, len(image_positions)),
            deal=deal,
        )


def _runs(positions: Tensor, starts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    if not len(positions) or positions.is_meta:
        return ()
    edges = (positions.diff() != 1) | torch.isin(positions[1:], torch.tensor(starts))
    first = positions[torch.cat([torch.tensor([True]), edges])].tolist()
    last = positions[torch.cat([edges, torch.tensor([True])])].tolist()
    return tuple((a, b + 1) for a, b in zip(first, last))


def pack_pixels(pixels: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Joins images to one flat tensor."""
    return torch.cat([p.reshape(-1).to(dtype or p.dtype) for p in pixels]) if pixels else torch.empty(0, dtype=dtype)


def unpack_pixels(flat: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """The images again, views of ``flat``."""
    return tuple(part.view(shape) for part, shape in zip(flat.split([shape.numel() for shape in shapes]), shapes))


def row_from_samples(
    samples: Sequence[EncodedSample],
    *,
    filler_token_id: int = 0,
    multiple_of: int = 1,
    fill_to: int = 0,
    holes: int = 0,
) -> Row:
    """Lays whole samples end to end as one row.

    Args:
        samples: in order; may be empty when every sample of the row was a hole.
        filler_token_id: id of filler tokens.
        multiple_of: fill the row to a multiple of this (tp under sequence parallelism).
        fill_to: fill the row to exactly this many tokens (virtual pipeline stages); 0: no.
        holes: samples of the plan that could not be read; recorded.

    Returns:
        The row. A row without samples holds ``max(1, multiple_of, fill_to)`` filler tokens and no loss.

    Raises:
        ValueError: the samples are longer than ``fill_to``.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    total = sum(lengths)
    target = max(fill_to, -(-total // multiple_of) * multiple_of, multiple_of)
    if fill_to and target != fill_to:
        raise ValueError(
            f"samples of {lengths} tokens (a multiple of {multiple_of} is needed) do not fit {fill_to} tokens"
        )
    parts = [_tokens(sample) for sample in samples]
    filler = target - total
    if filler:
        parts.append(_filler(filler, filler_token_id, parts[0] if parts else {}))
    starts = (0, *accumulate(lengths))
    positions = [sample.image_positions + start for sample, start in zip(samples, starts)]
    return Row.of(
        {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]},
        [*lengths, filler] if filler else lengths,
        pixels=tuple(image for sample in samples for image in sample.pixels),
        grids=tuple(grid for sample in samples for grid in sample.grids),
        image_positions=torch.cat(positions) if positions else _none(),
        keys=tuple(sample.key for sample in samples),
        num_filler=filler,
        holes=holes,
    )


def _tokens(sample: EncodedSample) -> dict[str, Tensor]:
    shifted = torch.full_like(sample.labels, IGNORE_INDEX)
    shifted[:-1] = sample.labels[1:]
    return {"input_ids": sample.input_ids, "position_ids": sample.position_ids, "labels": shifted, **sample.more}


def _filler(length: int, token_id: int, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A segment of filler with the names and leading dimensions of ``like``: positions from 0, and 0 for what families add."""
    made = {
        "input_ids": torch.full((length,), token_id, dtype=torch.int64),
        "position_ids": torch.arange(length),
        "labels": torch.full((length,), IGNORE_INDEX, dtype=torch.int64),
    }
    for name, tensor in like.items():
        values = made.get(name, torch.zeros(length, dtype=tensor.dtype))
        made[name] = values.expand(*tensor.shape[:-1], length)
    return made
