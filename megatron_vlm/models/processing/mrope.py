"""Three positions a token, M-RoPE of Qwen2-VL and its successors: time, row and column.

text: all three go on by one      an image: its time stands still, rows and columns count from where the text had come to
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def mrope_positions(images: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """Positions of the tokens of one sample: int64 [3, L].

    What follows an image goes on at its largest side beyond where it began. Source: transformers 5.23,
    models/qwen2_5_vl/modeling_qwen2_5_vl.py, ``get_rope_index``.

    Args:
        images: bool [L], tokens of images.
        grids: (frames, rows, columns) of each image in tokens, in order.

    Raises:
        ValueError: the grids have another number of tokens.
    """
    places = images.nonzero()[:, 0]
    if len(places) != sum(frames * rows * columns for frames, rows, columns in grids):
        raise ValueError(f"{len(places)} tokens of images for grids of {list(grids)}")
    steps = torch.ones(len(images), dtype=torch.int64)  # from each token to the next text
    starts, shifts, first = [], [], 0
    for frames, rows, columns in grids:
        run = places[first : first + frames * rows * columns]
        first += len(run)
        steps[run] = 0
        steps[run[-1]] = max(rows, columns)
        axes = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij")
        shifts.append(torch.stack(axes).flatten(1))
        starts.append(run)
    positions = (steps.cumsum(0) - steps).expand(3, -1).clone()
    if starts:
        positions[:, torch.cat(starts)] += torch.cat(shifts, 1)
    return positions
