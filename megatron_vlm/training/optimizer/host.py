"""AdamW with its state in the host's memory: fp32 main parameters and moments that the device has no room for.

    gradients on the device, summed --norm--> piece by piece to a page-locked buffer --AdamW on the host--> main, moments
    main --cast--> page-locked buffer --> weights on the device --distributed optimizer: all-gather--> the other ranks' copies

Pieces go down and up in streams of their own while the host works on others. They start after the norm, which clipping needs:
what the host does for a number takes several times as long as its way over the link, so that the link is hidden behind it,
and no second copy of all gradients is held. Only what travels is page-locked.

megatron-core 0.16.1's HybridDeviceOptimizer does not serve: without CUDA ``param.cpu()`` is the parameter itself and its maps
lose it (KeyError), so that nothing of it can be tested here; in bf16 it wants the distributed optimizer, its precise mode
Transformer Engine; and main parameters are made on the device first, which has no room for them.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import _get_param_groups_and_buffers
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn
from torch.optim.adamw import adamw

from megatron_vlm.parallel.host import copy_stream, empty_beside, host_empty, on_stream

PIECE = 1 << 24
"""Numbers that travel at a time."""
_SLOTS = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """What this rank updates of a parameter: the elements [start, end) of it.

    Attributes:
        parameter: of the stage.
        start, end: place in the flat parameter.
        host: main parameter and moments lie on the host.
        main: fp32 [end - start]; the weight itself, where that is fp32 on the same side.
        weight: [end - start], on the device, or with ``offload: optimizer+parameters`` on the host.
        group: of the inner AdamW.
    """

    parameter: nn.Parameter
    start: int
    end: int
    host: bool
    main: Tensor
    weight: Tensor
    group: dict[str, Any]

    @property
    def grad(self) -> Tensor:
        """On the device, in the dtype of the gradient buffer."""
        return getattr(self.parameter, "main_grad").view(-1)[self.start : self.end]  # noqa: B009 - DDP's attribute


def on_host(sizes: Sequence[int], fraction: float) -> list[bool]:
    """Which of parameters of these sizes go to the host, so that about ``fraction`` of all numbers are there, no more."""
    left, found = fraction * sum(sizes), []
    for size in sizes:
        found.append(size <= left)
        left -= size if found[-1] else 0
    return found


class HostOptimizer(MixedPrecisionOptimizer):
    """In place of megatron-core's optimizers, with their numbers: norm, clipping and loss scale as there.

    Args:
        config: megatron-core's.
        stages: wrapped.
        overrides: of parameter groups, as ``get_megatron_optimizer`` takes them.
        fraction: of main parameters and moments, on the host.
        tp_group: tensor parallel ranks.

    Attributes:
        parts: in the order of the inner AdamW's groups.
    """

    def __init__(self, config: Any, stages: Sequence[Any], overrides: Any, fraction: float, tp_group: Any):
        groups, buffers = _get_param_groups_and_buffers(
            list(stages), 0, config, overrides, lambda group: not group["is_expert_parallel"], "buffers"
        )
        device = torch.cuda.current_device()
        self.device = device if isinstance(device, torch.device) else torch.device("cuda", device)
        fused = self.device.type == "cuda"
        self.stages, self.distributed = list(stages), config.use_distributed_optimizer
        ranges = _ranges([buffer for chunk in buffers.values() for buffer in chunk]) if self.distributed else None
        places = [_places(group["params"], ranges) for group in groups]
        sizes = [end - start for group in places for _, start, end in group]
        host = iter(on_host(sizes, fraction))
        self.parts: list[Part] = []
        for group, found in zip(groups, places):
            group["fused"] = fused
            group["params"] = []
            for parameter, start, end in found:
                there, weight = next(host), parameter.detach().view(-1)[start:end]
                main = weight if getattr(parameter, "on_host", False) else _main(weight, there)
                group["params"].append(main)
                self.parts.append(
                    Part(parameter=parameter, start=start, end=end, host=there, main=main, weight=weight, group=group)
                )
        betas = (config.adam_beta1, config.adam_beta2)
        inner = torch.optim.AdamW(
            groups or [{"params": []}], lr=config.lr, betas=betas, eps=config.adam_eps, weight_decay=config.weight_decay
        )
        if not groups:  # everything is frozen, on all ranks; torch refuses an empty list
            inner.param_groups.clear()
        super().__init__(inner, config, _scaler(config), lambda unused: None)
        self.is_stub_optimizer = not self.parts
        self.chained_optimizers = [self]
        self.tp_group = tp_group
        names = ProcessGroupCollection.setup_process_groups_for_optimizer(None, list(stages), False)
        self.grad_stats_parallel_group = names["intra_dist_opt_group" if self.distributed else "mp_group"]
        self._slots = [_Slot() for _ in range(_SLOTS)]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Gradients lie in the buffers of the stages, which are zeroed there."""

    def get_main_grads_for_grad_norm(self) -> list[Tensor]:
        """Those that count once."""
        return [
            part.grad
            for part in self.parts
            if param_is_not_shared(part.parameter) and param_is_not_tensor_parallel_duplicate(part.parameter, self.tp_group)
        ]  # fmt: skip

    def _copy_model_grads_to_main_grads(self) -> None:
        """They are read where they are."""

    def _collect_main_grad_data_for_unscaling(self) -> list[Tensor]:
        return [part.grad for part in self.parts]

    @torch.no_grad()
    def step(self) -> tuple[bool, float | None, None]:
        """One update of all parts: (whether there was one, norm of the gradients before clipping, None)."""
        if self.prepare_grads():
            return False, None, None
        norm, limit = self.get_grad_norm(), self.config.clip_grad
        factor = min(1.0, limit / (norm + 1.0e-6)) if limit > 0 else 1.0
        self._update_here(factor)
        self._update_on_host(factor)
        if self.distributed:
            for stage in self.stages:
                stage.start_param_sync()
        return True, norm, None

    def step_with_ready_grads(self) -> bool:
        """Never called: ``step`` does it."""
        raise NotImplementedError

    def state_dict(self) -> Any:
        """Checkpoints go by fragments (training/optimizer/state.py)."""
        raise NotImplementedError

    load_state_dict = sharded_state_dict = state_dict  # type: ignore[assignment]

    def _update_here(self, factor: float) -> None:
        """Parts whose state is on the device, a group at a time."""
        for group in self.optimizer.param_groups:
            parts = [part for part in self.parts if part.group is group and not part.host]
            if not parts:
                continue
            grads = [part.grad.float() for part in parts]
            if factor < 1.0:
                torch._foreach_mul_(grads, factor)
            states = [self._state(part) for part in parts]
            for state in states:
                state["step"] += 1
            self._adamw(group, [part.main for part in parts], grads, states)
            for part in parts:
                if part.main.data_ptr() != part.weight.data_ptr():
                    part.weight.copy_(part.main)

    def _update_on_host(self, factor: float) -> None:
        pieces = [
            (part, begin, min(begin + PIECE, len(part.main)))
            for part in self.parts
            if part.host
            for begin in range(0, len(part.main), PIECE)
        ]
        grads = {}
        with _threads(self.device):
            for number in range(len(pieces) + _SLOTS - 1):
                if number < len(pieces):
                    part, begin, end = pieces[number]
                    grad = part.grad[begin:end]
                    stays = part.main is part.weight  # all of it is on the host
                    grads[number] = (lambda here=grad: here) if stays else self._slots[number % _SLOTS].down(grad)
                if number < _SLOTS - 1:
                    continue
                number -= _SLOTS - 1
                part, begin, end = pieces[number]
                state = self._state(part)
                if begin == 0:
                    state["step"] += 1
                grad = grads.pop(number)()
                if factor < 1.0:
                    grad.mul_(factor)
                kept = {name: tensor[begin:end] if tensor.dim() else tensor for name, tensor in state.items()}
                self._adamw(part.group, [part.main[begin:end]], [grad], [kept])
                if part.main is not part.weight:
                    self._slots[number % _SLOTS].up(part.main[begin:end], part.weight[begin:end])
        if self.device.type == "cuda":
            torch.cuda.current_stream().wait_stream(copy_stream(self.device, "up"))

    def _state(self, part: Part) -> dict[str, Tensor]:
        state = self.optimizer.state[part.main]
        if "exp_avg" not in state:
            where = part.main.device if part.group["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=where)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = empty_beside(part.main, part.host).zero_()
        return state

    def _adamw(self, group: dict[str, Any], mains: list[Tensor], grads: list[Tensor], states: list[dict]) -> None:
        """torch's AdamW, its steps counted already; on a GPU run the fused kernel of either side."""
        beta1, beta2 = group["betas"]
        steps = [state["step"] - 1 for state in states]
        adamw(
            mains, grads, [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [], steps,
            foreach=False, fused=group["fused"], amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip


class _Slot:
    """Page-locked buffers of one piece on its way down, and of one on its way up."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.arrived: Any = None

    def down(self, grad: Tensor) -> Callable[[], Tensor]:
        """Begins to copy; what is returned waits for it and gives the gradient in fp32 on the host."""
        buffer = self._buffer("down", grad.dtype, grad)
        stream = copy_stream(grad.device, "down")
        with on_stream(stream):
            buffer.copy_(grad, non_blocking=True)
            done = None if stream is None else stream.record_event()

        def wait() -> Tensor:
            if done is not None:
                done.synchronize()
            return buffer.float()

        return wait

    def up(self, main: Tensor, weight: Tensor) -> None:
        """Begins to copy ``main`` into ``weight``."""
        if self.arrived is not None:
            self.arrived.synchronize()
        buffer = self._buffer("up", weight.dtype, weight).copy_(main)
        stream = copy_stream(weight.device, "up")
        with on_stream(stream):
            weight.copy_(buffer, non_blocking=True)
            self.arrived = None if stream is None else stream.record_event()

    def _buffer(self, way: str, dtype: torch.dtype, like: Tensor) -> Tensor:
        key = f"{way} {dtype}"
        if key not in self.buffers or len(self.buffers[key]) < len(like):
            self.buffers[key] = host_empty((len(like),), dtype, like.device)
        return self.buffers[key][: len(like)]


def _main(weight: Tensor, host: bool) -> Tensor:
    if host:
        return host_empty(weight.shape, torch.float32, weight.device, locked=False).copy_(weight)
    return weight if weight.dtype == torch.float32 else weight.float()


def _places(parameters: Sequence[nn.Parameter], ranges: dict[nn.Parameter, tuple[int, int]] | None) -> list[Any]:
    """(parameter, start, end) of what this rank updates, in megatron-core's order, which the norm's sum follows."""
    if ranges is None:
        return [(parameter, 0, parameter.numel()) for parameter in parameters]
    mine = set(parameters)
    found = [(parameter, *place) for parameter, place in ranges.items() if parameter in mine]
    return sorted(found, key=lambda place: place[0].dtype != torch.float32)  # fp32 ones first; stable


def _ranges(buffers: Sequence[Any]) -> dict[nn.Parameter, tuple[int, int]]:
    """Of each parameter that has elements in this rank's share of the buffers, which."""
    found = {}
    for buffer in buffers:
        for buckets in DistributedOptimizer._build_gbuf_range_map(buffer).values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    found[parameter] = (ranges["param"].start, ranges["param"].end)
    return found


def _scaler(config: Any) -> Any:
    """megatron-core's, as ``get_megatron_optimizer`` makes it."""
    if config.loss_scale:
        return ConstantGradScaler(config.loss_scale)
    if not config.fp16:
        return None
    return DynamicGradScaler(
        initial_scale=config.initial_loss_scale, min_scale=config.min_loss_scale, growth_factor=2.0, backoff_factor=0.5,
        growth_interval=config.loss_scale_window, hysteresis=config.hysteresis,
    )  # fmt: skip


@contextmanager
def _threads(device: torch.device) -> Iterator[None]:
    """torchrun gives each rank one thread: beside a GPU the update takes this rank's share of the machine's cores."""
    before = torch.get_num_threads()
    if device.type == "cuda":
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(before, len(os.sched_getaffinity(0)) // ranks))
    try:
        yield
    finally:
        torch.set_num_threads(before)
