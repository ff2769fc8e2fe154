"""Images dealt over ranks: each is encoded once, its features go where their tokens are.

    shapes of images, who holds which token --share_images--> ImageShare: which rank encodes which, by cost, the largest first
    own features [f, H] --exchange--> features of this rank's image tokens, in order; gradients come back the same way

The images of one row over its tp x cp ranks, or those of all rows of a step over a whole replica. A pure function of shapes and
of who holds which token, which every rank knows. A token lies on one context parallel rank and, alike, on all of its tensor
parallel ranks: each of these gets its features, and all hold the same gradient of them, of which one copy goes back. So nothing
is summed on the way, and the gradients of tower and connector are sums over the ranks that encode, as data parallel ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from megatron_vlm.errors import DataError
from megatron_vlm.layers.attention import to_device
from megatron_vlm.layers.context.attention import Deal, all_to_all


def assign(costs: Sequence[float], size: int) -> tuple[tuple[int, ...], ...]:
    """Images of each rank, in the row's order: the largest first, each to the rank with the least so far."""
    loads, found = [0.0] * size, [[] for _ in range(size)]  # type: tuple[list[float], list[list[int]]]
    for image in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(size), key=lambda r: (loads[r], r))
        loads[rank] += costs[image]
        found[rank].append(image)
    return tuple(tuple(sorted(images)) for images in found)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageParts:
    """What of an image is dealt: parts that tower and connector take for images of their own.

    Attributes:
        number: parts.
        cut: the image [C, h, w], on meta too -> its parts.
        features, work: of each part.
        tokens: int64, which of the parts' features, end to end, each image token takes; None: all in order.
    """

    number: int
    cut: Callable[[Tensor], Sequence[Tensor]]
    features: int
    work: float
    tokens: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Route:
    """Rows of a tensor on their way between the ranks of a group, seen from one of them.

    Attributes:
        sends: int64, of this rank's rows, those for rank 0, 1, ..., one after the other; ``sent`` how many each.
        receives: rows that come from each rank.
        arrange: int64, from the order of arrival to that of this rank.
    """

    sends: Tensor
    sent: list[int]
    receives: list[int]
    arrange: Tensor

    @classmethod
    def of(cls, sends: Sequence[Tensor], come_from: Tensor, device: torch.device) -> Self:
        """``sends``: rows for each rank; ``come_from``: the rank that each row of the result comes from."""
        return cls(
            sends=to_device(torch.cat(list(sends)), device),
            sent=[len(part) for part in sends],
            receives=torch.bincount(come_from, minlength=len(sends)).tolist(),
            arrange=to_device(torch.argsort(torch.argsort(come_from, stable=True)), device),
        )

    def carry(self, x: Tensor, group: Any) -> Tensor:
        """x [n, ...] -> what comes to this rank, in its order. A collective of ``group``, without gradients."""
        return all_to_all(x.index_select(0, self.sends), self.sent, self.receives, group).index_select(0, self.arrange)


@dataclass(frozen=True, eq=False)
class ImageShare:
    """Images over a group of ranks, seen from one of them.

    Attributes:
        owners: images that each rank encodes.
        features: features of this rank's images, to be checked against what the connector gives.
        there, back: the way of features to their tokens, and of their gradients to who encoded them.
        takes: int64, which of this rank's features each gradient that comes back is of; None: all in order.
        rank, group: of the ranks that encode.
    """

    owners: tuple[tuple[int, ...], ...]
    features: int
    there: Route
    back: Route
    takes: Tensor | None
    rank: int
    group: Any

    @property
    def mine(self) -> tuple[int, ...]:
        """Images that this rank encodes."""
        return self.owners[self.rank]

    def exchange(self, features: Tensor) -> Tensor:
        """Features of own images [f, H] -> those of this rank's image tokens [n, H]. A collective, backward too.

        Raises:
            DataError: they are not as many as was told when images were dealt.
        """
        if len(features) != self.features:
            raise DataError(
                f"{len(self.mine)} images give {len(features)} image features in place of {self.features}: the model and its "
                "config's image_cost disagree"
            )
        return _Exchange.apply(features, self)

    def bring_back(self, gradient: Tensor) -> Tensor:
        """Gradients of this rank's image tokens [n, H] -> those of own features [f, H]. A collective."""
        gradient = self.back.carry(gradient, self.group)
        if self.takes is None:
            return gradient
        total = gradient.new_zeros(
            self.features, *gradient.shape[1:], dtype=torch.promote_types(gradient.dtype, torch.float32)
        )
        return total.index_put_((self.takes,), gradient.to(total.dtype), accumulate=True).to(gradient.dtype)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, share: ImageShare) -> Tensor:
        ctx.share = share
        return share.there.carry(features, share.group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.share.bring_back(grad), None


def holders(deal: Deal, image_positions: Tensor) -> Tensor:
    """int64: the context parallel rank that holds each of a row's image tokens."""
    holder = torch.empty(deal.starts[-1], dtype=torch.int64)
    for rank, intervals in enumerate(deal.intervals):
        for a, b in intervals:
            holder[a:b] = rank
    return holder[image_positions]


def share_images(
    counts: Sequence[int],
    costs: Sequence[float],
    holder: Tensor,
    *,
    size: int,
    rank: int,
    group: Any,
    device: torch.device,
    copies: int = 1,
    source: Tensor | None = None,
) -> ImageShare:
    """Deals images over the ranks of a group.

    Args:
        counts: features of each image.
        costs: work of each image, in any unit.
        holder: int64, the context parallel rank that holds each image token.
        size, rank, group: of the ranks that encode. Tokens of context parallel rank c lie on ranks c * copies and the next.
        device: of the features.
        copies: tensor parallel ranks, where these encode apart.
        source: int64, which feature each image token takes; None: all in order.
    """
    owners = assign(costs, size)
    owner_of_image = torch.empty(len(counts), dtype=torch.int64)
    for number, images in enumerate(owners):
        owner_of_image[list(images)] = number
    owner_of_feature = owner_of_image.repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    own = owner_of_feature == rank
    every = torch.arange(len(own)) if source is None else source
    owner = owner_of_feature[every]
    mine = owner == rank
    held = holder == rank // copies  # by none of a later stage
    wanted_by = holder[mine]  # of the tokens of this rank's features, in order
    takes = (own.cumsum(0) - 1)[every[mine]]
    sends = [takes[wanted_by == number // copies] for number in range(size)]
    # All copies of a token have the same gradient. That of the same place among its copies as the owner's returns it.
    come_from = owner[held]
    returns = [(come_from == number).nonzero()[:, 0] for number in range(size)]
    returns = [part if number % copies == rank % copies else part[:0] for number, part in enumerate(returns)]
    return ImageShare(
        owners=owners,
        features=int(own.sum()),
        there=Route.of(sends, come_from, device),
        back=Route.of(returns, wanted_by * copies + rank % copies, device),
        takes=None if source is None else to_device(takes, device),
        rank=rank,
        group=group,
    )
