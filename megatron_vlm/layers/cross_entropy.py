"""Head and cross entropy in one: the sum of token losses without ever holding the logits of a whole row.

    for each chunk of tokens:  hidden @ weight.T -> logits [n, V / tp] -- piece by piece, in place: loss, their gradient
                               -> gradient of hidden, gradient of weight

The gradients are made in the forward pass and scaled in the backward pass, so that no logits are kept or recomputed
(the idea of Liger Kernel, arXiv 2410.10989; here over a vocabulary split over tensor parallel ranks). Rows of ``weight``
that only pad the vocabulary take no part: their logits are -inf, and the result is that of the true vocabulary. They are
multiplied all the same: an odd number of rows costs a GPU several times what the padding does.

A chunk has tokens enough for good products and, where the weight trains, for few passes over its fp32 gradient, whatever the
vocabulary; a piece is so small that the passes over it stay in a processor's cache, or on a GPU bounds what is made in fp32.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Logits of one chunk on one rank, where that is more than ``CHUNK_TOKENS``."""
CHUNK_TOKENS = {True: 3072, False: 1024}
"""Least tokens of a chunk where the weight trains, and where it does not: 0.93 and 0.31 GB of bf16 logits of 151k words."""
PIECE_ELEMENTS = 1 << 24
"""Logits in fp32 at a time on one rank, 64 MiB."""
CACHED_ELEMENTS = 1 << 18
"""The same on the CPU, 1 MiB; of tensor parallel ranks, which sum over the vocabulary piece by piece, as on a GPU."""
meta_stands_for = "cuda"
"""The device whose memory is estimated where tensors are on meta."""


def linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    group: Any,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Returns sum_n -log softmax(hidden_n @ weight.T + low_n @ b.T)[target_n].

    Args:
        hidden: [N, H], equal on all ranks of ``group``; its gradient comes out as this rank's partial sum.
        weight: [V_padded / tp, H], this rank's rows of the head.
        targets: int64 [N], ids in the true vocabulary.
        vocab_size: true vocabulary; rows from there on are padding.
        group: tensor parallel group.
        low_rank: ``low`` [N, r], equal on all ranks of ``group``, its gradient this rank's partial sum like that of ``hidden``;
            and ``b`` [V_padded / tp, r]: a low-rank addition to ``weight``. None: none.

    Returns:
        fp32 scalar, equal on all ranks of ``group``.
    """
    inputs = [hidden, weight, *(low_rank or (None, None))]
    if not torch.is_grad_enabled():  # a parameter counts as in need of a gradient even then, which would be made
        inputs = [None if x is None else x.detach() for x in inputs]
    return _LinearCrossEntropy.apply(*inputs, targets, vocab_size, group)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        low: Tensor | None,
        b: Tensor | None,
        targets: Tensor,
        vocab_size: int,
        group: Any,
    ) -> Tensor:
        rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
        start = rank * weight.shape[0]
        real = max(0, min(weight.shape[0], vocab_size - start))  # this rank's rows that are no padding
        inputs = (hidden, weight, low, b)
        # fp32 until the backward pass has scaled them: fp16 gradients before loss scaling would underflow.
        grads = [
            torch.empty_like(x, dtype=torch.float32) if x is not None and needed else None
            for x, needed in zip(inputs, ctx.needs_input_grad)
        ]
        grad_hidden, grad_weight, grad_low, grad_b = grads
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows = max(1, weight.shape[0])
        step = max(CHUNK_TOKENS[grad_weight is not None], CHUNK_ELEMENTS // rows)
        on_cpu = (meta_stands_for if hidden.is_meta else hidden.device.type) == "cpu"
        piece = max(1, (CACHED_ELEMENTS if on_cpu and size == 1 else PIECE_ELEMENTS) // rows)
        buffer = hidden.new_empty(min(step, len(hidden)), len(weight))
        boost = 1024.0 if hidden.dtype == torch.float16 else 1.0
        for first in range(0, hidden.shape[0], step):
            chunk = slice(first, first + step)
            h, target = hidden[chunk], targets[chunk] - start
            logits = torch.mm(h, weight.t(), out=buffer[: len(h)])
            more = low[chunk] @ b.t() if low is not None and b is not None else None
            losses = []
            for at in range(0, len(target), piece):
                part = slice(at, at + piece)
                x = logits[part].float()  # in fp32 the logits themselves
                if more is not None:
                    x += more[part]
                losses.append(_loss_to_gradient(x, target[part], real, group, size))
                if x.dtype != logits.dtype:
                    logits[part] = x.mul_(boost) if boost != 1.0 else x
            total += torch.cat(losses).sum()
            if grad_low is not None and b is not None:
                grad_low[chunk] = (logits @ b).float() / boost
            if grad_b is not None and low is not None:
                _add(grad_b, logits, low[chunk], first, boost)
            if grad_hidden is not None:
                grad_hidden[chunk] = (logits @ weight).float() / boost
            if grad_weight is not None:
                _add(grad_weight, logits, h, first, boost)
        if not len(hidden):
            for grad in grads:
                _ = None if grad is None else grad.zero_()
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = [
            None
            if grad is None
            else torch.mul(
                grad, grad_output, out=grad if dtype == grad.dtype else grad.new_empty(grad.shape, dtype=dtype)
            )
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        ]
        return (*grads, None, None, None)


def _add(grad: Tensor, logits: Tensor, x: Tensor, first: int, boost: float) -> None:
    """Adds ``logits.t() @ x / boost`` to fp32 ``grad``, unset before the chunk at 0; in fp32 with no pass but the product's.

    Sums over a chunk's tokens of numbers with a boost leave the range of fp16: there the product is fp32.
    """
    if logits.dtype == grad.dtype:
        torch.mm(logits.t(), x, out=grad) if first == 0 else grad.addmm_(logits.t(), x)
        return
    if boost == 1.0:
        product = logits.t() @ x
    elif x.device.type != "cpu":
        product = torch.mm(logits.t(), x, out_dtype=torch.float32).div_(boost)
    else:
        product = (logits.t().float() @ x.float()).div_(boost)
    grad.copy_(product) if first == 0 else grad.add_(product)


def _loss_to_gradient(logits: Tensor, target: Tensor, real: int, group: Any, size: int) -> Tensor:
    """Turns fp32 logits [n, v] into their gradient in place and returns the n token losses.

    Args:
        logits: of this rank's rows of the vocabulary, of which the first ``real`` are no padding.
        target: int64 [n], counted from the first of them.
        real, group, size: as of the caller.
    """
    if real < logits.shape[1]:
        logits[:, real:] = -torch.inf
    index = torch.arange(len(target), device=target.device)
    mine = (target >= 0) & (target < real)
    column = target.clamp(0, max(0, real - 1))
    peak = logits.amax(1)  # -inf where this rank holds padding only
    if size > 1:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    logits -= peak[:, None]
    picked = logits[index, column].masked_fill(~mine, 0.0)
    logits.exp_()
    sums = torch.stack([picked, logits.sum(1)])
    if size > 1:
        dist.all_reduce(sums, group=group)
    logits /= sums[1][:, None]
    logits[index, column] -= mine.float()
    return sums[1].log() - sums[0]
