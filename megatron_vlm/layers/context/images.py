"""Images of a row shared over its context parallel ranks: each is encoded once, its features go where their tokens are.

    shapes of all images --share_images--> ImageShare: which rank encodes which, by cost, the largest first
    own features [f, H] --exchange--> features of this rank's image tokens, in order; gradients come back the same way

A pure function of shapes and of who holds which token, which every rank knows. An image token lies on one rank, so that every
feature goes to one: nothing is summed, and the gradients of tower and connector are sums over the ranks, as data parallel ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.layers.context.attention import AllToAll, Deal


def assign(costs: Sequence[float], size: int) -> tuple[tuple[int, ...], ...]:
    """Images of each rank, in the row's order: the largest first, each to the rank with the least so far."""
    loads, found = [0.0] * size, [[] for _ in range(size)]  # type: tuple[list[float], list[list[int]]]
    for image in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(size), key=lambda r: (loads[r], r))
        loads[rank] += costs[image]
        found[rank].append(image)
    return tuple(tuple(sorted(images)) for images in found)


@dataclass(frozen=True, eq=False)
class ImageShare:
    """The images of one row over a context parallel group, seen from one of its ranks.

    Attributes:
        owners: images that each rank encodes.
        features: features of this rank's images, to be checked against what the connector gives.
        sends: int64, of these, what rank 0, 1, ... needs, one after the other; ``sent`` how many each.
        receives: features that come from each rank.
        arrange: int64, from the order of arrival to that of this rank's image tokens.
        rank, group: of the context parallel group.
    """

    owners: tuple[tuple[int, ...], ...]
    features: int
    sends: Tensor
    sent: list[int]
    receives: list[int]
    arrange: Tensor
    rank: int
    group: Any

    @property
    def mine(self) -> tuple[int, ...]:
        """Images that this rank encodes."""
        return self.owners[self.rank]

    def exchange(self, features: Tensor) -> Tensor:
        """Features of own images [f, H] -> those of this rank's image tokens [n, H]. A collective, backward too."""
        received = AllToAll.apply(features.index_select(0, self.sends), self.sent, self.receives, self.group)
        return received.index_select(0, self.arrange)


def share_images(deal: Deal, image_positions: Tensor, counts: Sequence[int], costs: Sequence[float]) -> ImageShare:
    """Deals the images of a row.

    Args:
        deal: of the row's tokens.
        image_positions: int64, the row's tokens that hold image features, in order of the images.
        counts: features of each image.
        costs: work of each image, in any unit.

    Raises:
        ValueError: the features of the images are not as many as their tokens.
    """
    if sum(counts) != len(image_positions):
        raise ValueError(
            f"{len(counts)} images give {sum(counts)} features for {len(image_positions)} image tokens of a row"
        )
    owners = assign(costs, deal.size)
    holder = torch.empty(deal.starts[-1], dtype=torch.int64)
    for rank, intervals in enumerate(deal.intervals):
        for a, b in intervals:
            holder[a:b] = rank
    consumer = holder[image_positions]
    owner_of_image = torch.empty(len(counts), dtype=torch.int64)
    for rank, images in enumerate(owners):
        owner_of_image[list(images)] = rank
    owner = owner_of_image.repeat_interleave(torch.tensor(counts))
    place = torch.empty(len(owner), dtype=torch.int64)  # of a feature among those of its owner
    for rank in range(deal.size):
        own = owner == rank
        place[own] = torch.arange(int(own.sum()))
    sends = [place[(owner == deal.rank) & (consumer == rank)] for rank in range(deal.size)]
    come_from = owner[consumer == deal.rank]
    return ImageShare(
        owners=owners,
        features=int((owner == deal.rank).sum()),
        sends=torch.cat(sends).to(deal.device),
        sent=[len(part) for part in sends],
        receives=torch.bincount(come_from, minlength=deal.size).tolist(),
        arrange=torch.argsort(torch.argsort(come_from, stable=True)).to(deal.device),
        rank=deal.rank,
        group=deal.group,
    )
