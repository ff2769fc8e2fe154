"""Three positions a token, M-RoPE of Qwen2-VL and its successors: time, row and column.

text: all three go on by one      an image: its time stands still, rows and columns count from where the text had come to
a video: its time goes on with its frames, so many positions a pair as its seconds are worth
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def mrope_positions(
    images: Tensor, grids: Sequence[tuple[int, int, int]], intervals: Sequence[float] | None = None
) -> Tensor:
    """Positions of the tokens of one sample: int64 [3, L].

    What follows an image or a video goes on at its larger side, rows or columns, beyond where it began. Source:
    transformers 5.23, models/qwen2_5_vl/modeling_qwen2_5_vl.py, ``get_rope_index``.

    Args:
        images: bool [L], tokens of images and videos.
        grids: (pairs of frames, rows, columns) of each in tokens, in order; one pair of an image.
        intervals: positions of time from pair to pair of each, whole or not; None: 1.

    Raises:
        ValueError: the grids have another number of tokens.
    """
    places = images.nonzero()[:, 0]
    if len(places) != sum(frames * rows * columns for frames, rows, columns in grids):
        raise ValueError(f"{len(places)} tokens of images for grids of {list(grids)}")
    steps = torch.ones(len(images), dtype=torch.int64)  # from each token to the next text
    starts, shifts, first = [], [], 0
    for (frames, rows, columns), interval in zip(grids, intervals or [1.0] * len(grids), strict=True):
        run = places[first : first + frames * rows * columns]
        first += len(run)
        steps[run] = 0
        steps[run[-1]] = max(rows, columns)
        times = (torch.arange(frames) * torch.tensor(interval, dtype=torch.float32)).long()  # in 32 bits, as there
        axes = torch.meshgrid(times, torch.arange(rows), torch.arange(columns), indexing="ij")
        shifts.append(torch.stack(axes).flatten(1))
        starts.append(run)
    positions = (steps.cumsum(0) - steps).expand(3, -1).clone()
    if starts:
        positions[:, torch.cat(starts)] += torch.cat(shifts, 1)
    return positions
