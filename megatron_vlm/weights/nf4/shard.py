"""NF4 over tensor parallel ranks: what one rank holds of a linear whose HF tensors were each quantised whole.

    HF tensors --nf4.quantise, each whole--> blocks of 64 values --the blocks that a shard's lines touch--> codes, absmax

A shard of a Megatron tensor (fused rows, cut by rows or columns) is a list of *lines*: stretches of equal width that lie end
to end in the shard, each inside the flattened HF tensor it comes from. A rank holds the blocks that its lines touch. Where
every line starts at a block and is a whole number of blocks wide, which is so for the sizes of every published decoder,
these blocks are the shard, at 4.127 (4.5) bits per parameter. Elsewhere (rows of 4304, 1152 columns over 4 ranks) up to
63 values on either side of each line are held too, and left out after dequantising. Values are those of the whole tensor,
bit for bit, in every layout: nothing is quantised twice and no scale is computed over a shard.

Legend: L lines, K blocks that a line touches, G groups of 256 blocks of all HF tensors together.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_vlm.errors import ConfigError
from megatron_vlm.weights.mapping import Entry
from megatron_vlm.weights.nf4.tensor import BLOCK, GROUP, Nf4Tensor, absmax_of, block_values


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Where a shard lies in the HF tensors of its entry.

    Attributes:
        shape: (rows, columns) of the shard.
        width: values of a line.
        tensor: int64 [L], number of the HF tensor that a line lies in.
        start: int64 [L], its first value there.
    """

    shape: tuple[int, int]
    width: int
    tensor: Tensor
    start: Tensor

    @staticmethod
    def of(entry: Entry, shapes: Sequence[tuple[int, ...]], tp: int, tp_rank: int) -> "Lines":
        """The lines of one rank's shard of a 2-D weight.

        Args:
            entry: with its split for ``tp`` ranks.
            shapes: of its HF tensors.
            tp, tp_rank: the rank's place.
        """
        split, columns = entry.split, shapes[0][1]
        if split.pads or split.dim not in (None, 0, 1) or (split.dim == 1 and split.stride != 1):
            raise ValueError(f"{entry.name} is no linear that can be quantised: {split}")
        bounds = torch.tensor([0, *(shape[0] for shape in shapes)]).cumsum(0)
        # The entry's own rule of fusing, applied to the numbers of the rows.
        rows = entry.to_full([torch.arange(int(a), int(b)) for a, b in itertools.pairwise(bounds)])
        if split.dim == 0:
            rows = split.shard(rows, tp, tp_rank)
        tensor = torch.bucketize(rows, bounds[1:], right=True)
        start = (rows - bounds[tensor]) * columns
        if split.dim == 1 and tp > 1:
            if columns % tp:
                raise ConfigError(f"{entry.name}: {columns} columns do not divide by tensor parallel size {tp}")
            width = columns // tp
            return Lines(shape=(len(rows), width), width=width, tensor=tensor, start=start + tp_rank * width)
        breaks = (rows.diff() != 1) | tensor.diff().bool()
        ends = [int(end) + 1 for end in breaks.nonzero()] + [len(rows)]
        step = functools.reduce(math.gcd, ends)  # rows that lie together everywhere
        return Lines(shape=(len(rows), columns), width=step * columns, tensor=tensor[::step], start=start[::step])


class Nf4Weight(nn.Module):
    """All of a rank's NF4 weight but its codes: scales, and how blocks make up the shard. Buffers, in no state dict.

    Attributes:
        shape: (rows, columns).
        dtype: of the values.
        absmax: fp32 (its bits as int32 where it is cut over ranks) or, with double quantisation, uint8 [L * K].
        group: int32 [L], number of a line's first block counting on over all groups; None without double quantisation.
        scales, offset: fp32 [G], of each group; None likewise.
        skip: int64 [L, 1], values of a line's first block that lie before it; None: the same for all (``skip_all``).
    """

    absmax: Tensor
    group: Tensor | None
    scales: Tensor | None
    offset: Tensor | None
    skip: Tensor | None

    def __init__(self, lines: Lines, dtype: torch.dtype, parts: dict[str, Tensor | None], blocks_per_line: int):
        super().__init__()
        self.shape, self.width, self.num_lines = lines.shape, lines.width, len(lines.start)
        self.dtype, self.blocks_per_line = dtype, blocks_per_line
        for name in ("absmax", "group", "scales", "offset"):
            self.register_buffer(name, parts[name], persistent=False)
        skip = lines.start % BLOCK
        self.skip_all = int(skip[0])
        same = bool((skip == self.skip_all).all())
        self.register_buffer("skip", None if same else skip[:, None], persistent=False)

    def values(self, codes: Tensor) -> Tensor:
        """The shard [rows, columns], dequantised, from ``codes`` uint8 [L * K, 32]."""
        absmax = self.absmax.view(torch.float32) if self.absmax.dtype == torch.int32 else self.absmax
        if self.group is not None and self.scales is not None and self.offset is not None:
            within = torch.arange(self.blocks_per_line, device=absmax.device, dtype=torch.int32)
            group = ((self.group[:, None] + within) // GROUP).view(-1).clamp_(max=len(self.scales) - 1)
            absmax = absmax_of(absmax, self.scales[group], self.offset[group])
        lines = block_values(codes, absmax, self.dtype).view(self.num_lines, -1)
        if self.skip is None:
            return lines[:, self.skip_all : self.skip_all + self.width].reshape(self.shape)
        return lines.gather(1, self.skip + torch.arange(self.width, device=lines.device)).view(self.shape)

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}, {self.dtype}, double_quant={self.group is not None}"


def shard(lines: Lines, tensors: Iterable[Nf4Tensor], dtype: torch.dtype) -> tuple[Tensor, Nf4Weight]:
    """Takes one rank's blocks out of whole tensors.

    Args:
        lines: the rank's.
        tensors: the entry's HF tensors, in order; each is let go of before the next is asked for.
        dtype: of the values.

    Returns:
        Codes, uint8 [L * K, 32], and what makes values of them.
    """
    first = lines.start // BLOCK
    count = int(((lines.start % BLOCK + lines.width - 1) // BLOCK).max()) + 1
    total = len(first) * count
    codes = absmax = torch.empty(0)
    group, scales, offsets = torch.zeros(len(first), dtype=torch.int32), [], []
    num_groups = 0
    for number, tensor in enumerate(tensors):
        device = tensor.codes.device
        if not number:
            codes = torch.empty(total, BLOCK // 2, dtype=torch.uint8, device=device)
            absmax = torch.empty(total, dtype=tensor.absmax.dtype, device=device)
        mine = (lines.tensor == number).nonzero()[:, 0]
        within = torch.arange(count)
        # Behind a tensor's end, the last block stands in: no value of it is used.
        block = (first[mine, None] + within).clamp_(max=tensor.num_blocks - 1).view(-1).to(device)
        place = (mine[:, None] * count + within).view(-1).to(device)
        codes[place], absmax[place] = tensor.blocks()[block], tensor.absmax[block]
        if tensor.scales is not None and tensor.offset is not None:
            group[mine] = (first[mine] + num_groups * GROUP).int()
            num_groups += len(tensor.scales)
            scales.append(tensor.scales)
            offsets.append(tensor.offset.expand_as(tensor.scales))
    parts: dict[str, Tensor | None] = dict(absmax=absmax, group=None, scales=None, offset=None)
    if scales:
        parts |= dict(group=group.to(absmax.device), scales=torch.cat(scales), offset=torch.cat(offsets))
    return codes, Nf4Weight(lines, dtype, parts, count).to(absmax.device)
