"""Kernels of Transformer Engine and of apex below our layers: the same parameters under the same names, another product or norm.

    linear  what ranks exchange, as ever; the product by a te.pytorch.Linear that is lent this rank's weight, in fp8 where the
            config says so; then bias, adapters and partial LoRA, as ever
    norm    te.pytorch.RMSNorm and LayerNorm, lent the weight; or apex's functions

Lent: a module of Transformer Engine has no parameters of its own here and is none of the model's modules, so that checkpoints,
conversion, sharding and optimizer see what they always do. Sources: Transformer Engine's documentation (2.x) and apex's
normalization/fused_layer_norm.py. Tested with stand-ins of these interfaces, not run on a device.
"""

import importlib
from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from megatron_vlm.layers.linear import ColumnLinear, RowLinear, UnbiasedColumnLinear
from megatron_vlm.layers.norm import LayerNorm, RMSNorm

RECIPES = {"tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling", "mxfp8": "MXFP8BlockScaling"}
"""``model.fp8`` -> of transformer_engine.common.recipe; none of them keeps scales of steps before."""
_BLOCK = 32  # sizes of an fp8 product are multiples of it: tokens are filled up with zeros, other weights stay in bf16


def _lent(owner: nn.Module, make: Any, **parameters: Any) -> Any:
    """The module of Transformer Engine beside ``owner``, with ``owner``'s parameters in place of its own."""
    engine = owner.__dict__.get("engine")
    if engine is None:
        engine = owner.__dict__["engine"] = make(importlib.import_module("transformer_engine.pytorch"))
    engine._parameters.update(parameters)
    return engine


class _EngineProduct:
    """Before a linear: its product by Transformer Engine."""

    def _forward_impl(self, input: Tensor, weight: Any, bias: Tensor | None = None, **rest: Any) -> Tensor:
        if self.product is not None:  # type: ignore[attr-defined]  # in 4 bits
            return super()._forward_impl(input=input, weight=weight, bias=bias, **rest)  # type: ignore[misc, no-any-return]
        if rest["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(input, group=rest["tp_group"])
        elif rest["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=rest["tp_group"])
        if input.is_meta:  # what is kept for the backward pass is asked for: as by te.Linear, the whole input
            output = F.linear(input, weight)
            return output if bias is None else output + bias
        (out, size), x = weight.shape, input.flatten(0, -2)
        fp8 = getattr(self.config, "fp8_products", None)  # type: ignore[attr-defined]
        fp8 = None if out % _BLOCK or size % _BLOCK else fp8
        engine = _lent(
            self,  # type: ignore[arg-type]
            lambda te: te.Linear(size, out, bias=False, params_dtype=weight.dtype, device="meta"),
            weight=weight,
        )
        if fp8 is None:
            output = engine(x)
        else:
            te = importlib.import_module("transformer_engine.pytorch")
            recipe = getattr(importlib.import_module("transformer_engine.common.recipe"), RECIPES[fp8])
            with te.fp8_autocast(enabled=True, fp8_recipe=recipe()):
                output = engine(F.pad(x, (0, 0, 0, -len(x) % _BLOCK)))[: len(x)]
        output = output.unflatten(0, input.shape[:-1])
        return output if bias is None else output + bias


class EngineColumnLinear(_EngineProduct, ColumnLinear):
    """Column parallel."""


class EngineUnbiasedColumnLinear(_EngineProduct, UnbiasedColumnLinear):
    """The same, never with a bias."""


class EngineRowLinear(_EngineProduct, RowLinear):
    """Row parallel."""


class EngineRMSNorm(RMSNorm):
    """By Transformer Engine's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return super().forward(x)
        size, how = x.shape[-1], dict(eps=self.eps, dtype=self.weight.dtype, device="meta")
        how["zero_centered_gamma"] = self.zero_centered
        return _lent(self, lambda te: te.RMSNorm(size, **how), weight=self.weight)(x)


class EngineLayerNorm(LayerNorm):
    """By Transformer Engine's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return super().forward(x)
        size, how = x.shape[-1], dict(eps=self.eps, dtype=self.weight.dtype, device="meta")
        return _lent(self, lambda te: te.LayerNorm(size, **how), weight=self.weight, bias=self.bias)(x)


class ApexRMSNorm(RMSNorm):
    """By apex's kernel, which knows no weight around zero: such a one by torch's."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta or self.zero_centered:
            return super().forward(x)
        apex: Any = importlib.import_module("apex.normalization.fused_layer_norm")
        return apex.fused_rms_norm_affine(x, self.weight, self.weight.shape, self.eps)


class ApexLayerNorm(LayerNorm):
    """By apex's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:
            return super().forward(x)
        apex: Any = importlib.import_module("apex.normalization.fused_layer_norm")
        return apex.fused_layer_norm_affine(x, self.weight, self.bias, self.weight.shape, self.eps)
