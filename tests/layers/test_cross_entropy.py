"""Head and cross entropy in one, against torch: split over ranks, a padded vocabulary, no logits of a whole row."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vlm.layers import cross_entropy
from megatron_vlm.layers.cross_entropy import linear_cross_entropy_sum
from megatron_vlm.testing.distributed import run_distributed

TOKENS, HIDDEN, VOCAB = 37, 16, 101


def draw():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return hidden, weight, targets


def on_rank(padded, chunk_elements):
    """Gradient of hidden (summed over ranks), this rank's rows of the weight's gradient, and the loss."""
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, targets = draw()
    local = torch.zeros(padded, HIDDEN)
    local[:VOCAB] = weight
    local[VOCAB:] = 9.0  # padding must take no part, whatever it holds
    local = local.chunk(size)[rank].clone().requires_grad_()
    hidden.requires_grad_()
    before, cross_entropy.CHUNK_ELEMENTS = cross_entropy.CHUNK_ELEMENTS, chunk_elements
    loss = linear_cross_entropy_sum(hidden, local, targets, VOCAB, dist.group.WORLD)
    cross_entropy.CHUNK_ELEMENTS = before
    (3.0 * loss).backward()
    dist.all_reduce(hidden.grad)
    return float(loss), hidden.grad, local.grad


@pytest.mark.parametrize("tp, padded", [(1, 101), (1, 128), (2, 128), (4, 128), (4, 256)])
@pytest.mark.parametrize("chunk_elements", [1 << 24, 300])
def test_equals_torch(tp, padded, chunk_elements):
    hidden, weight, targets = (x.requires_grad_() if x.is_floating_point() else x for x in draw())
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    (3.0 * expected).backward()
    results = run_distributed(on_rank, padded, chunk_elements, tp=tp)
    for loss, grad, _ in results:
        assert loss == pytest.approx(float(expected), rel=1e-6)
        torch.testing.assert_close(grad, hidden.grad, rtol=1e-5, atol=1e-5)
    full = torch.cat([r[2] for r in results])
    torch.testing.assert_close(full[:VOCAB], weight.grad, rtol=1e-5, atol=1e-5)
    assert full[VOCAB:].abs().max() == 0 if padded > VOCAB else True


def test_no_tokens_and_frozen_head():
    hidden, weight, targets = draw()
    hidden.requires_grad_()
    loss = linear_cross_entropy_sum(hidden[:0], weight, targets[:0], VOCAB, None)
    loss.backward()
    assert float(loss) == 0 and hidden.grad.abs().max() == 0
    linear_cross_entropy_sum(hidden, weight, targets, VOCAB, None).backward()
    assert weight.grad is None and hidden.grad.abs().max() > 0


class LargestTensor(TorchDispatchMode):
    """Counts how many tensors of at least ``size`` elements are made."""

    def __init__(self, size):
        super().__init__()
        self.size, self.count, self.largest = size, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                self.count += x.numel() >= self.size and x._base is None
        return out


def test_the_logits_of_a_row_are_never_held(monkeypatch):
    """4096 tokens x 5000 words: nothing of that size is made, forward or backward; plain cross entropy makes several."""
    tokens, vocab, width = 4096, 5000, 8
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,))
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 1 << 20)
    with LargestTensor(tokens * vocab) as ours:
        linear_cross_entropy_sum(hidden, weight, targets, vocab, None).backward()
    with LargestTensor(tokens * vocab) as plain:
        F.cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()
    assert ours.count == 0 and ours.largest <= 1 << 20
    assert plain.count >= 2
