"""Gradient buffers of megatron-core's DistributedDataParallel that a step begins without a pass over them.

    a step begins --first microbatch--> gradients written --the others--> added --finish_grad_sync--> zeros where none came

megatron-core zeroes the buffers and adds every microbatch. What is read afterwards is the same.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import nn


class Gradients(DistributedDataParallel):
    """megatron-core's, whose parameters say by ``gradient_unset`` that what their ``main_grad`` holds is of an earlier step."""

    def zero_grad_buffer(self) -> None:
        """Begins a step."""
        for parameter in self.params_with_grad:
            parameter.grad_added_to_main_grad = False
            parameter.gradient_unset = True
        for group in self.bucket_groups:
            group.reset()

    def settle(self) -> None:
        """Zeroes the gradients of parameters that had none in this step."""
        for parameter in self.params_with_grad:
            if getattr(parameter, "gradient_unset", False):
                parameter.main_grad.zero_()
                parameter.gradient_unset = False

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """After ``settle``, as ever."""
        self.settle()
        super().finish_grad_sync(force_all_reduce)

    def _make_backward_post_hook(self, param: nn.Parameter) -> Callable[..., None]:
        add: Any = super()._make_backward_post_hook(param)
        known: Any = param

        def hook(*unused: Any) -> None:
            if param.grad is not None and getattr(param, "gradient_unset", False):
                known.main_grad.copy_(param.grad)
                known.gradient_unset, known.grad_added_to_main_grad = False, True
                if getattr(param, "zero_out_wgrad", False):  # tied to a head: megatron-core adds it whatever was said
                    param.grad.zero_()
            add()
            known.grad_added_to_main_grad = False

        return hook
