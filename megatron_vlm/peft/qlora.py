"""QLoRA (arXiv 2305.14314): linears whose frozen weight stays in NF4 and is dequantised for each product.

    source --HF tensor by HF tensor--> quantise whole --> this rank's blocks --> linear.weight (codes), linear.nf4 (scales)
    which are there from the start, without values, so that ranks may share them first (training/optimizer/sharded.py)
    forward   y = x @ values(codes).T (+ bias)      backward   dx = dy @ values(codes), summed as megatron-core does

Codes and scales are buffers: no gradient, no optimizer state, no part of a checkpoint. Linears take another ``product`` with
their weight (layers/linear.py); their classes, forward passes and other parameters stay as they are. Embedding, head,
norms, biases and the branches of partial LoRA keep the dtype of the run.
"""

from collections.abc import Collection, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megatron_vlm.errors import ConfigError
from megatron_vlm.layers.linear import Place
from megatron_vlm.log import get_logger
from megatron_vlm.models.built import Model, global_named_modules
from megatron_vlm.parallel.shards import put
from megatron_vlm.peft.config import PeftConfig
from megatron_vlm.sources.quantised import nf4_tensors, quantised_names
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.weights.mapping import Entry
from megatron_vlm.weights.nf4.shard import Lines, Nf4Weight, shard
from megatron_vlm.weights.nf4.tensor import Nf4Tensor, Quantization
from megatron_vlm.weights.safetensors_io import PARAMS_DTYPES

log = get_logger(__name__)


def quantization_of(peft: PeftConfig, dtype: Literal["fp32", "bf16", "fp16"]) -> Quantization | None:
    """What a run's config asks for; ``dtype`` is its precision."""
    if peft.quantize is None:
        return None
    return Quantization(
        format=peft.quantize,
        double_quant=peft.double_quant,
        groups=peft.quantize_groups,
        dtype=dtype,
    )


def take_weights(
    model: Model, source: WeightSource, quantization: Quantization, keep: Collection[str] = ()
) -> dict[str, nn.Module]:
    """Removes the weights of the linears that are to be quantised, before the stages go to their device.

    Args:
        model: not wrapped.
        source: tells which weights are linears.
        quantization: which groups.
        keep: global names of weights that train in full, and so stay.

    Returns:
        Global name of the weight -> its linear, which cannot run until ``outline`` and ``fill`` have been called.

    Raises:
        ConfigError: one to keep is stored in 4 bits.
    """
    names = quantised_names(source.mapping, source.infos, quantization.groups)
    trained = sorted(names & set(keep))
    if trained and source.quantization is not None:
        raise ConfigError(
            f"{trained[0]} trains in full (peft.modules_to_save), but is stored in 4 bits: start from weights whose "
            f"--quantize-groups leave its part of the model out"
        )
    if trained:
        log.info("%d linears train in full and are not quantised: %s ...", len(trained), trained[0])
    taken: dict[str, nn.Module] = {}
    for stage in model:
        for module_name, module in global_named_modules(stage):
            name = f"{module_name}.weight"
            if name not in names or name in trained:
                continue
            if Place.of(module) is None:
                raise TypeError(f"{module_name} is a {type(module).__name__}, which cannot be quantised")
            del module.weight
            module.register_buffer("weight", torch.empty(0, dtype=torch.uint8), persistent=False)
            taken[name] = module
    return taken


def outline(linears: dict[str, nn.Module], source: WeightSource, quantization: Quantization, model: Model) -> None:
    """Gives each of ``take_weights``' linears an NF4 weight without values, in the CPU's memory, which takes none until then.

    Args:
        linears: global name of the weight -> linear.
        source: of full-precision weights, or of stored codes.
        quantization: how.
        model: of the linears.
    """
    for entry, shapes, linear in _entries(linears, source, model):
        tensors = [Nf4Tensor.on_meta(shape, double=quantization.double_quant) for shape in shapes]
        codes, weight = _shard(entry, shapes, tensors, quantization, model)
        install(linear, torch.empty_like(codes, device="cpu"), weight.to_empty(device="cpu"))


def fill(linears: dict[str, nn.Module], source: WeightSource, quantization: Quantization, model: Model) -> None:
    """Gives the weights of ``outline`` their values, one HF tensor in memory at a time: what this rank holds of them.

    Args:
        linears, source, quantization: as of ``outline``.
        model: of the linears, wrapped or not; tensors are quantised on its device.
    """
    for entry, shapes, linear in _entries(linears, source, model):
        tensors = nf4_tensors(source, entry, quantization, model.device)
        codes, weight = _shard(entry, shapes, tensors, quantization, model)
        for mine, whole in [(linear.weight, codes), *((getattr(linear.nf4, n), w) for n, w in weight.named_buffers())]:
            put(mine, whole.view(mine.dtype))


def _entries(linears: dict[str, nn.Module], source: WeightSource, model: Model) -> Iterator[tuple[Entry, list, Any]]:
    """Yields (entry, shapes of its HF tensors, linear)."""
    entries = model.mapping.by_name()
    for name, linear in linears.items():
        yield entries[name], [tuple(part.shape) for part in entries[name].from_full(source.infos[name].meta())], linear


def _shard(
    entry: Entry, shapes: list, tensors: Iterable[Nf4Tensor], quantization: Quantization, model: Model
) -> tuple[Tensor, Nf4Weight]:
    lines = Lines.of(entry, shapes, model.topology.tp, model.topology.tp_rank)
    return shard(lines, tensors, PARAMS_DTYPES[quantization.dtype])


def install(linear: nn.Module, codes: Tensor, weight: Nf4Weight) -> None:
    """Makes a linear without weight one whose weight is in NF4."""
    linear.weight = codes
    linear.nf4 = weight
    linear.product = partial(_linear, weight)  # type: ignore[assignment]


def _linear(
    nf4: Nf4Weight,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: Any,
    grad_output_buffer: list[Tensor] | None = None,
    wgrad_deferral_limit: int | None = None,
) -> Tensor:
    """megatron-core's ``linear_with_frozen_weight`` for codes: as there, a bias gets no gradient here (peft/lora.py sees to it).

    The fusion and the last two arguments are about the weight's gradient, and there is none.
    """
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
    output = Nf4Product.apply(input, weight, nf4, tp_group if allreduce_dgrad else None)
    return output if bias is None else output + bias.detach()


class Nf4Product(torch.autograd.Function):
    """x @ W.T, W dequantised in each pass: between them only the codes are kept, which the model holds anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, nf4: Nf4Weight, group: Any) -> Tensor:
        """
        Args:
            x: [..., columns].
            codes: uint8, of the shard.
            nf4: what makes values of them.
            group: the gradient of x is summed over its ranks; None: it is not.

        Returns:
            [..., rows], in x's dtype.
        """
        ctx.save_for_backward(codes)
        ctx.nf4, ctx.group = nf4, group
        return x @ nf4.values(codes).to(x.dtype).t()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:  # type: ignore[override]
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (codes,) = ctx.saved_tensors
        grad_x = grad @ ctx.nf4.values(codes).to(grad.dtype)
        if ctx.group is not None:
            dist.all_reduce(grad_x, group=ctx.group)
        return grad_x, None, None, None
