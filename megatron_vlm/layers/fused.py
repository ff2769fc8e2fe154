"""Element-wise parts of a layer as one kernel each, forward and backward: torch.compile of exactly these functions.

    MLP: linear --bias, activation, gate--> linear     attention: linear --queries, keys, values apart, RoPE--> core attention
    a linear's weight: gradient of its output, input --product--> added to the fp32 gradient buffer by the product itself

Plain layers run half a dozen kernels in their place, each of which reads and writes all tokens. Only these pure functions are
compiled, with sizes left open: nothing of a layer is traced, so that adapters, hooks and parallel regions stay as they are. What
is kept for the backward pass is the input alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_vlm.layers.core_attention import RowParams
from megatron_vlm.layers.linear import ColumnLinear, RowLinear, UnbiasedColumnLinear
from megatron_vlm.layers.solo import SoloGroup

Activation = Callable[[Tensor], Tensor]


def activate(x: Tensor, bias: Tensor | None, activation: Activation, gated: bool) -> Tensor:
    """[T, F] -> [T, F], or gated [T, 2 F] -> [T, F]: activation(gate) * up (arXiv 2002.05202), of x + bias."""
    if bias is not None:
        x = x + bias
    if not gated:
        return activation(x)
    gate, up = x.chunk(2, -1)
    return activation(gate) * up


def activate_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, activation: Activation, gated: bool, sum_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x [T, ...] and, with ``sum_bias``, of the bias."""
    (dx,) = torch.func.vjp(lambda x: activate(x, bias, activation, gated), x)[1](grad)
    return dx, dx.sum(0) if sum_bias else None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in fp32 (RoFormer, Su et al. 2021): [T, heads, D] with the halves of a head rotated against each other.

    Args:
        x: queries or keys; the result has their dtype.
        cos, sin: fp32 [T, 1, D / 2], of each token's angles.
    """
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def split_rotated(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, groups, heads / groups + 2, D] -> queries [T, heads, D] and keys [T, groups, D], rotated, and values like these."""
    q, k = rotate(qkv[:, :, :-2].flatten(1, 2), cos, sin), rotate(qkv[:, :, -2], cos, sin)
    return q, k, qkv[:, :, -1].clone()


def join_rotated(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradients of ``split_rotated``: they are rotated back."""
    q = rotate(q, cos, -sin).unflatten(1, (k.shape[1], -1))
    return torch.cat((q, rotate(k, cos, -sin)[:, :, None], v[:, :, None]), 2)


def add_product(main: Tensor, grad: Tensor, x: Tensor, begin: bool) -> None:
    """main [out, in] += grad.T [out, T] @ x [T, in]; ``begin``: =. One product, in the dtype of ``main``, where torch has it."""
    if grad.dtype != main.dtype and main.is_cpu:
        product = grad.t() @ x
        _ = main.copy_(product) if begin else main.add_(product)
        return
    rest: dict[str, Any] = {"out": main} | ({} if grad.dtype == main.dtype else {"out_dtype": main.dtype})
    _ = torch.mm(grad.t(), x, **rest) if begin else torch.addmm(main, grad.t(), x, **rest)


def in_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as one kernel; as it is on meta, where only shapes are asked for."""
    compiled = torch.compile(function, dynamic=True)
    return lambda x, *rest: (function if x.is_meta else compiled)(x, *rest)


KERNELS = {
    function: in_one(function) for function in (activate, activate_backward, rotate, split_rotated, join_rotated)
}


class Activate(torch.autograd.Function):
    """``activate``; keeps x and the bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, activation: Activation, gated: bool) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.how = activation, gated
        return KERNELS[activate](x.flatten(0, -2), bias, activation, gated).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, bias = ctx.saved_tensors
        rows = grad.flatten(0, -2), x.flatten(0, -2)
        dx, dbias = KERNELS[activate_backward](*rows, bias, *ctx.how, bool(ctx.needs_input_grad[1]))
        return dx.unflatten(0, x.shape[:-1]), dbias, None, None


class Rotate(torch.autograd.Function):
    """``rotate``; keeps the angles' cos and sin, which all layers share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return KERNELS[rotate](x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return KERNELS[rotate](grad, cos, -sin), None, None


class SplitRotated(torch.autograd.Function):
    """``split_rotated``; keeps what ``Rotate`` does."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return KERNELS[split_rotated](qkv, cos, sin)

    @staticmethod
    def backward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None, None]:
        return KERNELS[join_rotated](q, k, v, *ctx.saved_tensors), None, None


class AddProduct(torch.autograd.Function):
    """``output`` as it is; on the way back the gradient of a linear's weight, into its ``main_grad``: see
    training/optimizer/gradients.py."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, weight: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        rows = grad.flatten(0, -2), x.flatten(0, -2)
        filler = getattr(weight, "guarded_by", None)
        if filler is not None and filler.passing:
            return grad, None, torch.zeros_like(weight)
        if not hasattr(weight, "main_grad"):  # in shards, or not wrapped
            return grad, None, rows[0].t() @ rows[1]
        add_product(weight.main_grad, *rows, getattr(weight, "gradient_unset", False))
        weight.gradient_unset, weight.grad_added_to_main_grad = False, True
        return grad, None, torch.empty_like(weight)  # never read: DDP's hook runs where there is one


class _AddsInPlace:
    """Before a linear whose product with the weight's gradient needs nothing of other ranks at that time, or it is as ever."""

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **rest: Any) -> Tensor:
        product: Any = super()._forward_impl  # type: ignore[misc]
        exchanges = rest["sequence_parallel"] or rest["allreduce_dgrad"]
        if exchanges or not (weight.requires_grad and torch.is_grad_enabled()):
            return product(input=input, weight=weight, bias=bias, **rest)
        output = product(input=input, weight=weight.detach(), bias=None, **rest)
        output = AddProduct.apply(output, input, weight)
        return output if bias is None else output + bias


class FusedColumnLinear(_AddsInPlace, ColumnLinear):
    """Column parallel."""


class FusedUnbiasedColumnLinear(_AddsInPlace, UnbiasedColumnLinear):
    """The same, never with a bias."""


class FusedRowLinear(_AddsInPlace, RowLinear):
    """Row parallel."""


class FusedMLP(MLP):
    """megatron-core's MLP with bias, activation and gate in one kernel."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        if config.tensor_model_parallel_size == 1:  # a layer hands the group of its ranks to no class but MLP itself
            kwargs.setdefault("tp_group", SoloGroup())
        super().__init__(config, *args, **kwargs)

    def forward(
        self, hidden_states: Tensor, per_token_scale: None = None, **unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        x, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(Activate.apply(x, bias, self.config.activation_func, self.config.gated_linear_unit))


class FusedSelfAttention(SelfAttention):
    """megatron-core's SelfAttention that rotates queries and keys as it takes them apart, by ``RowParams.rotation``."""

    def forward(self, hidden_states: Tensor, *args: Any, packed_seq_params: RowParams, **kwargs: Any) -> Any:
        self.rotation = packed_seq_params.rotation
        return super().forward(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: None = None, output_gate: bool = False, split_qkv: bool = True
    ) -> tuple[Tensor, ...]:
        shared_heads = self.config.num_query_groups < self.world_size
        if self.rotation is None:
            return super().get_query_key_value_tensors(hidden_states)
        if shared_heads or self.q_layernorm is not None:
            q, k, v = super().get_query_key_value_tensors(hidden_states)
            q, k = (Rotate.apply(x.squeeze(1), *self.rotation)[:, None] for x in (q, k))
            return q, k, v
        qkv, _ = super().get_query_key_value_tensors(hidden_states, split_qkv=False)
        qkv = qkv.squeeze(1).unflatten(-1, (-1, self.hidden_size_per_attention_head))
        return tuple(x[:, None] for x in SplitRotated.apply(qkv, *self.rotation))
