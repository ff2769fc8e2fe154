"""Head and cross entropy in one, against torch: split over ranks, a padded vocabulary, no logits of a whole row."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vlm.layers import cross_entropy
from megatron_vlm.layers.cross_entropy import linear_cross_entropy_sum
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.training.memory.trace import Meter

TOKENS, HIDDEN, VOCAB = 37, 16, 101
SMALL = dict(CHUNK_ELEMENTS=1, CHUNK_TOKENS={True: 10, False: 7}, PIECE_ELEMENTS=300, CACHED_ELEMENTS=300)
"""Chunks of 10 or 7 tokens, in pieces of 1 to 4."""


def draw():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return hidden, weight, targets


def on_rank(padded, sizes):
    """Gradient of hidden (summed over ranks), this rank's rows of the weight's gradient, and the loss."""
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, targets = draw()
    local = torch.zeros(padded, HIDDEN)
    local[:VOCAB] = weight
    local[VOCAB:] = 9.0  # padding must take no part, whatever it holds
    local = local.chunk(size)[rank].clone().requires_grad_()
    hidden.requires_grad_()
    before = {name: getattr(cross_entropy, name) for name in sizes}
    vars(cross_entropy).update(sizes)
    loss = linear_cross_entropy_sum(hidden, local, targets, VOCAB, dist.group.WORLD)
    vars(cross_entropy).update(before)
    (3.0 * loss).backward()
    dist.all_reduce(hidden.grad)
    return float(loss), hidden.grad, local.grad


@pytest.mark.parametrize("tp, padded", [(1, 101), (1, 128), (2, 128), (4, 128), (4, 256)])
@pytest.mark.parametrize("sizes", [{}, SMALL], ids=["whole", "pieces"])
def test_equals_torch(tp, padded, sizes):
    hidden, weight, targets = (x.requires_grad_() if x.is_floating_point() else x for x in draw())
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    (3.0 * expected).backward()
    results = run_distributed(on_rank, padded, sizes, tp=tp)
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
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", {True: 200})
    with LargestTensor(tokens * vocab) as ours:
        linear_cross_entropy_sum(hidden, weight, targets, vocab, None).backward()
    with LargestTensor(tokens * vocab) as plain:
        F.cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()
    assert ours.count == 0 and ours.largest <= 1 << 20
    assert plain.count >= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", [False, True])
def test_chunks_and_pieces_change_rounding_alone(dtype, adapter, monkeypatch):
    """Of the head and of an adapter on it, against torch in fp64; in half precision within what its own products round."""
    hidden, weight, targets = draw()
    low, b = torch.randn(TOKENS, 3), torch.randn(VOCAB, 3)
    inputs = [x.to(dtype).requires_grad_() for x in (hidden, weight, *((low, b) if adapter else ()))]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    logits = exact[0] @ exact[1].T + (exact[2] @ exact[3].T if adapter else 0)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    expected.backward()
    for sizes in ({}, SMALL):
        for name, value in sizes.items():
            monkeypatch.setattr(cross_entropy, name, value)
        for x in inputs:
            x.grad = None
        loss = linear_cross_entropy_sum(*inputs[:2], targets, VOCAB, None, tuple(inputs[2:]) or None)
        loss.backward()
        bar = 1e-6 if dtype == torch.float32 else 1e-2
        assert float(loss) == pytest.approx(float(expected), rel=bar)
        for ours, theirs in zip(inputs, exact):
            assert ours.grad.dtype == dtype
            assert float((ours.grad.double() - theirs.grad).norm()) < bar * float(theirs.grad.norm())


def test_a_channel_that_all_tokens_of_a_chunk_share_in_fp16():
    """Its products with the gradients of 3,072 logits add up to far more than fp16 holds with the boost on them."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, low, b = (torch.randn(n, w, generator=generator) for n, w in ((3072, 8), (5, 8), (3072, 3), (5, 3)))
    hidden[:, 0], low[:, 0], targets = 6.0, 6.0, torch.randint(0, 2, (3072,), generator=generator)
    half = [x.half().requires_grad_() for x in (hidden, weight, low, b)]
    exact = [x.detach().float().requires_grad_() for x in half]
    for inputs in (half, exact):
        linear_cross_entropy_sum(*inputs[:2], targets, 5, None, tuple(inputs[2:])).backward()
    assert exact[1].grad.abs().max() > 64 * 10 and exact[3].grad.abs().max() > 64 * 10
    for ours, wanted in zip(half, exact):
        assert float((ours.grad.float() - wanted.grad).norm()) < 2e-3 * float(wanted.grad.norm())


def test_few_passes_over_the_gradient_of_the_weight(monkeypatch):
    """At 16k tokens, whatever the vocabulary: 6 products into it and the scaling of the backward pass. It was one for each
    110 tokens at 151k words, and two more."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 1)  # as where the vocabulary is large
    tokens, vocab, width = 16384, 300, 8
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)

    class Writes(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = isinstance(out, torch.Tensor) and out.shape == (vocab, width) and "empty" not in func.name()
            self.count += made and not func.is_view
            return out

    with Writes() as writes:
        linear_cross_entropy_sum(hidden, weight, torch.randint(0, vocab, (tokens,)), vocab, None).backward()
    assert 6 <= writes.count <= 8


def test_pieces_on_meta_are_those_of_the_device_it_stands_for(monkeypatch):
    """fp32 logits of a piece are 1 MiB on the CPU and up to 64 MiB on a GPU: what memory is estimated by."""
    peaks = {}
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(cross_entropy, "meta_stands_for", device)
        with Meter() as meter, torch.no_grad():
            hidden, weight = (torch.empty(n, 8, dtype=torch.bfloat16, device="meta") for n in (4096, 2048))
            linear_cross_entropy_sum(hidden, weight, torch.zeros(4096, dtype=torch.int64, device="meta"), 2048, None)
        peaks[device] = meter.peak
    assert 28 << 20 <= peaks["cuda"] - peaks["cpu"] <= 36 << 20
