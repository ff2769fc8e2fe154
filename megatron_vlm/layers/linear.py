"""Linears over tensor parallel ranks, with the seams that adapters, partial LoRA and NF4 use.

    y = product(x, W) + bias, then each branch (``plora``, ``lora``): y = branch(x, y)

column parallel     W cut along out; x whole, or cut over tokens under sequence parallelism
row parallel        W cut along in; y summed over ranks, scattered over tokens under sequence parallelism

A branch is a pair of narrow factors A, B beside W. What ranks exchange for it is as wide as the rank of the pair, once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """How a linear lies over ranks.

    Attributes:
        row: it is row parallel.
        sequence_parallel: what is not cut along the features is cut over tokens.
        group: the ranks.
    """

    row: bool
    sequence_parallel: bool
    group: Any

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """Of a parallel linear, the decoder's head included, which is never called; None: it is something else."""
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
            return None
        return cls(isinstance(module, RowParallelLinear), bool(module.sequence_parallel), module.tp_group)

    @property
    def draws_apart(self) -> bool:
        """Ranks hold other features or tokens of the input, and draw their own numbers; else the same, and draw alike."""
        return self.group.size() > 1 and (self.row or self.sequence_parallel)

    def exchange(self, low: Tensor) -> Tensor:
        """A x of what this rank has of x -> A x of what B needs here."""
        if self.row and self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(low, group=self.group)
        if self.row:
            return reduce_from_tensor_model_parallel_region(low, group=self.group)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=self.group)
        return copy_to_tensor_model_parallel_region(low, group=self.group)

    def mark(self, a: nn.Parameter, b: nn.Parameter) -> None:
        """Marks the factor whose gradient is a sum over tokens, of which a rank sees its own: finalize_model_grads sums it."""
        setattr(b if self.row else a, "sequence_parallel", self.sequence_parallel)  # noqa: B010 - megatron-core reads it


class _Seams:
    """Before a class of megatron-core's linears.

    Attributes:
        plora, lora: branches, called with the linear's input and output; None: there is none.
        product: in place of the product with the weight, with megatron-core's arguments for a frozen one; None: that.
    """

    plora: nn.Module | None
    lora: nn.Module | None
    product: Callable[..., Tensor] | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name in ("plora", "lora"):
            self.register_module(name, None)  # type: ignore[attr-defined]

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[T, 1, in] -> ([T, 1, out], bias where it is not added here)."""
        output, bias = super().forward(input_, *args, **kwargs)  # type: ignore[misc]
        for branch in (self.plora, self.lora):
            if branch is not None:
                output = branch(input_, output)
        return output, bias

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.product is not None:
            return self.product(input, weight, *args, **kwargs)
        return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]


class ColumnLinear(_Seams, ColumnParallelLinear):
    """megatron-core's column parallel linear."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As of the class above."""
        output, bias = super().forward(input_, *args, **kwargs)
        if (
            not self.skip_bias_add
            and self.bias is not None
            and self.bias.requires_grad
            and not self.weight.requires_grad
        ):
            # megatron-core's product with a frozen weight gives its bias no gradient: a zero that has one.
            output = output + (self.bias - self.bias.detach())
        return output, bias


class UnbiasedColumnLinear(ColumnLinear):
    """Without the bias that megatron-core's attention gives its linears all or none of."""

    def __init__(self, *args: Any, bias: bool = False, **kwargs: Any):
        super().__init__(*args, bias=False, **kwargs)


class RowLinear(_Seams, RowParallelLinear):
    """megatron-core's row parallel linear."""
