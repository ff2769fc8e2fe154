"""Head and cross entropy in one: the sum of token losses without ever holding the logits of a whole row.

    for each chunk of tokens:  hidden @ weight.T -> fp32 logits [n, V / tp] -> loss, then in place their gradient
                               -> gradient of hidden, gradient of weight

The gradients are made in the forward pass and scaled in the backward pass, so that no logits are kept or recomputed
(the idea of Liger Kernel, arXiv 2410.10989; here over a vocabulary split over tensor parallel ranks). Rows of ``weight``
that only pad the vocabulary take no part: their logits are -inf, and the result is that of the true vocabulary. They are
multiplied all the same: an odd number of rows costs a GPU several times what the padding does.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Logits of one chunk on one rank: 64 MiB in fp32."""


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
            torch.zeros_like(x, dtype=torch.float32) if x is not None and needed else None
            for x, needed in zip(inputs, ctx.needs_input_grad)
        ]
        grad_hidden, grad_weight, grad_low, grad_b = grads
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        step = max(1, CHUNK_ELEMENTS // max(1, weight.shape[0]))
        boost = 1024.0 if hidden.dtype == torch.float16 else 1.0
        for first in range(0, hidden.shape[0], step):
            h, target = hidden[first : first + step], targets[first : first + step] - start
            logits = (h @ weight.t()).float()
            if low is not None and b is not None:
                logits += low[first : first + step] @ b.t()
            logits[:, real:] = -torch.inf
            index = torch.arange(len(target), device=target.device)
            mine = (target >= 0) & (target < real)
            column = target.clamp(0, max(0, real - 1))
            total += _loss_to_probabilities(logits, index, column, mine, group, size)
            if all(grad is None for grad in grads):
                continue
            logits[index, column] -= mine.float()  # now the gradient of the logits
            if grad_low is not None and b is not None:
                grad_low[first : first + step] = logits @ b.float()
            if grad_b is not None and low is not None:
                grad_b += logits.t() @ low[first : first + step].float()
            gradient = (logits * boost).to(h.dtype) if boost != 1.0 else logits.to(h.dtype)
            del logits
            if grad_hidden is not None:
                grad_hidden[first : first + step] = (gradient @ weight).float() / boost
            if grad_weight is not None:
                grad_weight += (gradient.t() @ h).float() / boost
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = [
            None if grad is None else (grad * grad_output).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        ]
        return (*grads, None, None, None)


def _loss_to_probabilities(
    logits: Tensor, index: Tensor, column: Tensor, mine: Tensor, group: Any, size: int
) -> Tensor:
    """Turns fp32 logits [n, v] into probabilities in place and returns the sum of the n token losses."""
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
    return (sums[1].log() - sums[0]).sum()
