"""Images are dealt by their work; each feature goes to the rank that holds its token."""

import random

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.layers.context.attention import Deal
from megatron_vlm.layers.context.images import assign, share_images
from megatron_vlm.testing.distributed import run_distributed


def test_images_are_dealt_evenly():
    draw = random.Random(0)
    for _ in range(200):
        costs = [draw.choice([1.0, 1.0, 1.0, 2.0]) for _ in range(draw.randint(80, 100))]
        owners = assign(costs, 4)
        assert sorted(i for images in owners for i in images) == list(range(len(costs)))
        loads = [sum(costs[i] for i in images) for images in owners]
        assert max(loads) * 4 / sum(loads) <= 1.05


def test_fewer_images_than_ranks():
    assert assign([5.0, 7.0], 4) == ((1,), (0,), (), ())


def test_other_numbers_of_features_are_refused():
    deal = Deal((0, 8), 2, 0, None, torch.device("cpu"))
    with pytest.raises(ValueError, match="2 images give 5 features for 4 image tokens"):
        share_images(deal, torch.arange(4), [2, 3], [1.0, 1.0])


def exchanged(counts: list[int], positions: list[int], starts: tuple[int, ...]) -> tuple[bool, bool]:
    """On a rank: whether features and their gradients are those of all images on one rank."""
    deal = Deal(starts, dist.get_world_size(), dist.get_rank(), dist.group.WORLD, torch.device("cpu"))
    share = share_images(deal, torch.tensor(positions), counts, [float(n * n) for n in counts])
    torch.manual_seed(0)
    every, weight = torch.randn(2, sum(counts), 3, dtype=torch.float64)
    parts = every.split(counts)
    own = torch.cat([parts[i] for i in share.mine] or [every[:0]]).requires_grad_()
    out = share.exchange(own)
    held = torch.isin(torch.tensor(positions), deal.index)
    (out * weight[held]).sum().backward()
    wanted = torch.cat([weight.split(counts)[i] for i in share.mine] or [weight[:0]])
    assert len(own) == share.features and own.grad is not None
    return torch.equal(out, every[held]), torch.equal(own.grad, wanted)


@pytest.mark.parametrize("size", [2, 4])
def test_features_go_to_their_tokens_and_gradients_come_back(size):
    counts = [3, 1, 7, 2]
    positions = [0, 1, 2, 9, *range(20, 27), 38, 39]
    assert run_distributed(exchanged, counts, positions, (0, 13, 40), dp=size) == [(True, True)] * size
    assert run_distributed(exchanged, [4], [5, 6, 7, 8], (0, 40), dp=size) == [(True, True)] * size
