"""Images are dealt by their work; each feature goes to the rank that holds its token."""

import random

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.layers.context.attention import Deal
from megatron_vlm.layers.context.images import assign, holders, share_images
from megatron_vlm.testing.distributed import run_distributed


def test_images_are_dealt_evenly():
    draw = random.Random(0)
    for _ in range(200):
        costs = [draw.choice([1.0, 1.0, 1.0, 2.0]) for _ in range(draw.randint(80, 100))]
        owners = assign(costs, 4)
        assert sorted(i for images in owners for i in images) == list(range(len(costs)))
        loads = [sum(costs[i] for i in images) for images in owners]
        assert max(loads) * 4 / sum(loads) <= 1.05


def test_whole_images_of_a_step_are_even_where_those_of_a_row_are_not():
    """1 to 4 images a row of a document's and a photo's sizes on 4 ranks: 8 rows at once."""
    draw, alone, together = random.Random(0), [], []
    for _ in range(50):
        rows = [[draw.choice([1225, 1225, 2300, 4900]) for _ in range(draw.randint(1, 4))] for _ in range(8)]
        for found, batches in ((alone, rows), (together, [[n for row in rows for n in row]])):
            for images in batches:
                costs = [n * 1152.0 * 12 + n * n for n in images]
                loads = [sum(costs[i] for i in owned) for owned in assign(costs, 4)]
                found.append(max(loads) * 4 / sum(loads))
    assert sum(together) / len(together) <= 1.05 < 1.5 < sum(alone) / len(alone)


def test_fewer_images_than_ranks():
    assert assign([5.0, 7.0], 4) == ((1,), (0,), (), ())


def exchanged(counts: list[int], positions: list[int], starts: tuple[int, ...], tp: int, pp: int) -> tuple[bool, bool]:
    """On a rank of tp x cp x pp: whether features and their gradients are those of all images on one rank."""
    rank, device, cp = dist.get_rank(), torch.device("cpu"), dist.get_world_size() // (tp * pp)
    share = share_images(
        counts,
        [float(n * n) for n in counts],
        holders(Deal(starts, cp, 0, None, device), torch.tensor(positions)),
        size=dist.get_world_size(),
        rank=rank,
        group=dist.group.WORLD,
        device=device,
        copies=tp,
    )
    torch.manual_seed(0)
    every, weight = torch.randn(2, sum(counts), 3, dtype=torch.float64)
    parts = every.split(counts)
    own = torch.cat([parts[i] for i in share.mine] or [every[:0]]).requires_grad_()
    out = share.exchange(own)
    last_stage = rank // tp >= cp
    tokens = torch.empty(0) if last_stage else Deal(starts, cp, rank // tp, None, device).index
    held = torch.isin(torch.tensor(positions), tokens)
    (out * weight[held]).sum().backward()
    wanted = torch.cat([weight.split(counts)[i] for i in share.mine] or [weight[:0]])
    assert len(own) == share.features and own.grad is not None
    return torch.equal(out, every[held]), torch.equal(own.grad, wanted)


@pytest.mark.parametrize("tp, cp, pp", [(1, 2, 1), (1, 4, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)])
def test_features_go_to_their_tokens_and_gradients_come_back(tp, cp, pp):
    counts = [3, 1, 7, 2]
    positions = [0, 1, 2, 9, *range(20, 27), 38, 39]
    for args in ((counts, positions, (0, 13, 40)), ([4], [5, 6, 7, 8], (0, 40))):
        assert run_distributed(exchanged, *args, tp, pp, dp=tp * cp * pp) == [(True, True)] * (tp * cp * pp)
