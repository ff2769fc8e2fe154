"""Bytes that one microbatch of a stage needs: its real forward and backward pass over tensors without data.

    stage on meta + row --Meter: every storage that is made and let go--> kept after forward, peak

Large tensors lie on meta, where operations have shapes and no data; small ones (segment starts, positions) are computed, so
that the code under measure can read them. Collectives do nothing. What a device does in one kernel and the CPU in several is
told apart in ``_Kernels``.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vlm.layers import cross_entropy
from megatron_vlm.training.memory.sharded import Gathering, Sharding

SMALL = 4096
"""Elements of a floating point tensor up to which it is computed."""
_BLOCK = 512
"""CUDA's caching allocator rounds to this (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)."""


@dataclass(frozen=True, kw_only=True)
class ChunkBytes:
    """Of one microbatch of one model chunk.

    Attributes:
        kept: between its forward and its backward pass.
        forward, backward: at the worst moment of each, of this microbatch alone.
    """

    kept: int
    forward: int
    backward: int


class Meter(TorchDispatchMode):
    """Runs operations on meta and counts the storages that are alive.

    Attributes:
        now: bytes alive of what was made since the meter was entered.
        peak: the most of it since ``peak`` was last set.
    """

    def __init__(self, block: int = 1) -> None:
        super().__init__()
        self.block, self.now, self.peak = block, 0, 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return _collective(func, args)
        if any(x.is_meta for x in _tensors((*args, *kwargs.values()))):
            args = [_to_meta(x) for x in args]
            kwargs = {name: _to_meta(x) for name, x in kwargs.items()}
            if "device" in kwargs:
                kwargs["device"] = torch.device("meta")
        elif "device" in kwargs:
            kwargs = {**kwargs, "device": _place(func, args, kwargs)}
        result = func(*args, **kwargs)
        for x in _tensors(result if isinstance(result, list | tuple) else (result,)):
            self.add(x)
        return result

    def add(self, tensor: Tensor) -> None:
        """Counts a tensor's storage from now on, if it is not counted yet."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // self.block) * self.block
        self._known[key] = size
        weakref.finalize(storage, self._forget, key)
        self.now += size
        self.peak = max(self.peak, self.now)

    def ignore(self, module: nn.Module) -> None:
        """Leaves parameters and buffers of ``module`` out of the count."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._known[tensor.untyped_storage()._cdata] = 0

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


class _Kernels(TorchFunctionMode):
    """What is one kernel on the device, and would fall apart into several on meta.

    Attention keeps its operands, its output and one fp32 number per query and head (flash attention, arXiv 2307.08691), on the
    CPU as well; the exact attention, which fp32 takes anywhere, makes masks. RMSNorm on CUDA keeps its input and one number per
    row.
    """

    def __init__(self, device_kind: str, exact: bool = False) -> None:
        super().__init__()
        self.cuda = device_kind == "cuda"
        self.exact = exact or not self.cuda

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            masks = self.exact or args[0].dtype == torch.float32
            return _Attention.apply(*args[:3], kwargs.get("attn_mask") if masks else None)
        if func is F.rms_norm and self.cuda and args[0].is_meta:
            return _RmsNorm.apply(args[0], args[2] if len(args) > 2 else kwargs.get("weight"))
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    """[n, H, Lq, D], [n, G, Lk, D] twice, the exact attention's mask [Lq, Lk] -> [n, H, Lq, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:  # type: ignore[override]
        made = (
            ()
            if mask is None
            else (mask.new_empty(mask.shape), torch.empty(mask.shape, dtype=q.dtype, device=q.device))
        )
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device), *made[1:])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, *_ = ctx.saved_tensors
        heads = (*k.shape[:1], q.shape[1], *k.shape[2:])
        # Gradients of keys and values come out by query head, and those of queries are summed in fp32 (flash-attn 2).
        work = [k.new_empty(heads), v.new_empty(heads), torch.empty_like(q, dtype=torch.float32)]
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del work
        return *grads, None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (torch.empty_like(x) if wanted[0] else None, torch.empty_like(weight) if wanted[1] else None)


def measure_chunk(
    chunk: Any,
    make_batch: Callable[[], Any],
    hidden: tuple[int, ...],
    device_kind: Literal["cpu", "cuda"],
    sharding: Sharding | None = None,
    exact: bool = False,
) -> ChunkBytes:
    """Runs one microbatch forward and backward.

    Args:
        chunk: ``VisionLanguageModel`` on meta, in training mode.
        make_batch: makes the ``Row``; its pixels count.
        hidden: shape of what the stage before hands over.
        device_kind: device that is meant.
        sharding: of its parameters, which are not counted whole by whoever asks then.
        exact: attention in 16 bits is the exact one as well (``model.attention=segments``).
    """
    from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor

    def run() -> Tensor:
        received = None
        if not chunk.pre_process:
            received = torch.empty(hidden, dtype=chunk.config.params_dtype, device="meta", requires_grad=True)
        chunk.set_input_tensor(received)
        output = chunk(make_batch())
        if not chunk.post_process:
            deallocate_output_tensor(output, chunk.config.deallocate_pipeline_outputs)
        return output

    found = _measure(chunk, run, None if chunk.post_process else hidden, device_kind, sharding, exact)
    chunk.set_input_tensor(None)
    return found


def measure_images(chunk: Any, shapes: Sequence[torch.Size], device_kind: Literal["cpu", "cuda"]) -> ChunkBytes:
    """Runs tower and connector on parts of images of these shapes, forward and, where they train, backward."""

    def run() -> Tensor:
        with torch.set_grad_enabled(bool(chunk.trained)), chunk.saved.of_a_pass():
            return chunk.own_features([torch.empty(s, dtype=chunk.config.params_dtype, device="meta") for s in shapes])

    return _measure(chunk, run, (), device_kind)


def _measure(
    chunk: Any,
    run: Callable[[], Tensor],
    gradient: tuple[int, ...] | None,
    device_kind: Literal["cpu", "cuda"],
    sharding: Sharding | None = None,
    exact: bool = False,
) -> ChunkBytes:
    """``gradient``: shape of the output's; (): its own; None: the output is a loss."""
    cross_entropy.meta_stands_for = device_kind
    meter = Meter(_BLOCK if device_kind == "cuda" else 1)
    meter.ignore(chunk)
    gathering = Gathering(chunk, sharding) if sharding else None
    with ExitStack() as stack:
        if gathering is not None:
            gathering.install(stack)
        for parameter in chunk.parameters() if gathering is None else ():
            if parameter.requires_grad:  # as DDP does: into the gradient buffer, and gone
                hook = parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
                stack.callback(hook.remove)
        stack.enter_context(_Kernels(device_kind, exact))
        stack.enter_context(meter)
        output = run()
        kept, forward = meter.now, meter.peak
        meter.peak = kept
        if output.requires_grad:
            shape = output.shape if gradient == () else gradient
            grad = None if shape is None else torch.empty(shape, dtype=chunk.config.params_dtype, device="meta")
            _backward(output, grad)
        if gathering is not None:
            gathering.finish()
        return ChunkBytes(kept=kept, forward=forward, backward=meter.peak)


def _backward(output: Tensor, gradient: Tensor | None) -> None:
    """Tensor.backward would run outside of ``_Kernels``, and wants a gradient of the shape of an output that is freed already.

    Source: megatron-core 0.16.1, pipeline_parallel/schedules.py, ``custom_backward``.
    """
    torch.autograd.Variable._execution_engine.run_backward(  # type: ignore[attr-defined]
        tensors=(output,),
        grad_tensors=(torch.ones_like(output) if gradient is None else gradient,),
        keep_graph=False,
        create_graph=False,
        inputs=(),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results, in lists as well."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (x for x in value if isinstance(x, Tensor))


def _to_meta(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x if x.is_meta else x.to("meta")
    return [_to_meta(y) for y in x] if isinstance(x, list | tuple) else x


def _place(func: Any, args: Any, kwargs: Any) -> torch.device:
    """Where something that is made, or moved, goes: whole numbers stay readable, floating point ones where they are few.

    What is made empty holds nothing to read: a buffer of a collective belongs to the large tensors, whatever its size.
    """
    like = next((x for x in args if isinstance(x, Tensor)), None)
    filled = torch.int64 if func is torch.ops.aten.full.default and isinstance(args[1], int) else None
    dtype = kwargs.get("dtype") or filled or (torch.get_default_dtype() if like is None else like.dtype)
    size: Sequence[int] = next((x for x in args if isinstance(x, list | tuple)), () if like is None else like.shape)
    asked = kwargs["device"] is not None and torch.device(kwargs["device"]).type == "meta"
    asked = asked or func is torch.ops.aten.empty.memory_format
    return torch.device("meta" if dtype.is_floating_point and (asked or math.prod(size) > SMALL) else "cpu")


def _collective(func: Any, args: Any) -> Any:
    """Answers a collective as if it were done."""
    from torch._C._distributed_c10d import FakeWork, Work

    done = Work.boxed(FakeWork())  # type: ignore[attr-defined]
    return (args[0], done) if len(func._schema.returns) == 2 else done
