"""megatron-core's optimizers seen as one thing: each parameter's fp32 main parameter and AdamW state on this rank.

    FP32Optimizer | Float16OptimizerWithFloat16Params | DistributedOptimizer | our HostOptimizer --fragments--> [Fragment]

The only file that reaches into the optimizers of megatron-core 0.16.1 (underscore names included), which differ in
where main parameters live and in how much of each a data parallel rank holds. megatron-core's own load_state_dict is
not used: it gives all parameters of a DistributedOptimizer one shared step tensor, which every parameter then advances.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vlm.log import get_logger
from megatron_vlm.parallel.host import empty_beside
from megatron_vlm.weights.rank_files import Kind

MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True, eq=False)
class Fragment:
    """What this rank's optimizer holds of one parameter.

    Attributes:
        parameter: the model's parameter (a tensor parallel shard).
        dtype: of the weights that the model computes with.
        main: what AdamW updates: the elements [start, end) of the flat parameter, in fp32. It shares memory with the
            parameter where that is fp32.
        start, end: place of ``main``.
        sharded: other data parallel ranks hold the rest; else they hold the same.
        adam: the inner AdamW.
        group: its parameter group of ``main``.
        host: ``main`` and the moments lie in the host's memory, apart from the parameter of any dtype.
    """

    parameter: nn.Parameter
    dtype: torch.dtype
    main: Tensor
    start: int
    end: int
    sharded: bool
    adam: torch.optim.Optimizer
    group: dict[str, Any]
    host: bool = False

    @property
    def separate(self) -> bool:
        """The main parameter holds more than the weight does."""
        return self.dtype != torch.float32

    @property
    def step(self) -> float | None:
        """Updates made; None before the first."""
        state = self.adam.state.get(self.main, {})
        if "exp_avg" not in state:
            return None
        return float(state["step"] if "step" in state else self.group["step"])

    def state(self) -> dict[Kind, Tensor]:
        """Flat tensors ``param`` (where it is separate), ``exp_avg`` and ``exp_avg_sq`` (after the first update)."""
        state = self.adam.state.get(self.main, {})
        tensors: dict[Kind, Tensor] = {kind: state[kind].view(-1) for kind in MOMENTS if kind in state}
        return {"param": self.main.detach().view(-1), **tensors} if self.separate else tensors

    def set_main(self, shard: Tensor) -> None:
        """Copies this fragment out of a whole shard into the main parameter."""
        self.main.detach().view(-1).copy_(self._cut(shard))

    def set_moments(self, shards: dict[Kind, Tensor], step: float) -> None:
        """Makes AdamW's state from whole shards; ``step`` updates are taken as made."""
        state = self.adam.state[self.main]
        if _counts_per_parameter(self.adam):
            # One tensor per parameter, never shared: each update adds 1 to it.
            on_device = self.group.get("capturable") or self.group.get("fused")
            state["step"] = torch.tensor(step, dtype=torch.float32, device=self.main.device if on_device else "cpu")
        else:
            self.group["step"] = max(int(step), self.group.get("step", 0))
        for kind, shard in shards.items():
            state[kind] = empty_beside(self.main, self.host)
            state[kind].view(-1).copy_(self._cut(shard))

    def _cut(self, shard: Tensor) -> Tensor:
        return shard.reshape(-1)[self.start : self.end]


def fragments(optimizer: Any) -> list[Fragment]:
    """All fragments of this rank: none on a rank without trainable parameters.

    Args:
        optimizer: as ``get_megatron_optimizer`` returns it.
    """
    return [
        fragment
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
        if not part.is_stub_optimizer
        for fragment in _fragments(part)
    ]


def warn_of_shared_steps(fresh: Sequence[Fragment]) -> None:
    """Warns where parameters without state join ones with state under an AdamW that counts steps t per group.

    Their first update is then (1 - beta1) / (1 - beta1^t) * sqrt((1 - beta2^t) / (1 - beta2)) times as large as usual.
    """
    counted = [part for part in fresh if not _counts_per_parameter(part.adam) and part.group.get("step", 0) > 0]
    if counted:
        get_logger(__name__).warning(
            "%d newly trained parameters share the step count %s of their group, which %s keeps: their first updates "
            "are up to 3 times as large as usual; lower the learning rate or add a warm-up",
            len(counted),
            counted[0].group["step"],
            type(counted[0].adam).__name__,
        )


def scaler_state(optimizer: Any) -> dict[str, float] | None:
    """The dynamic loss scale as plain numbers; None without one."""
    for scaler in _scalers(optimizer):
        return {name: float(value) for name, value in scaler.state_dict().items()}
    return None


def restore_scaler(optimizer: Any, state: dict[str, float] | None) -> bool:
    """Puts back what ``scaler_state`` returned; False where either side has no dynamic loss scale."""
    scalers = list(_scalers(optimizer))
    if state is None or not scalers:
        return False
    for scaler in scalers:
        trackers = {name: int(value) for name, value in state.items() if name != "scale"}
        scaler.load_state_dict({"scale": torch.tensor([state["scale"]], dtype=torch.float32), **trackers})
    return True


def _fragments(part: Any) -> Iterator[Fragment]:
    if hasattr(part, "parts"):  # of training/optimizer/host.py
        for piece in part.parts:
            owner, start = _owner(piece.parameter)
            yield Fragment(
                parameter=owner,
                dtype=part.config.params_dtype if owner is not piece.parameter else owner.dtype,
                main=piece.main,
                start=start + piece.start,
                end=start + piece.end,
                sharded=part.distributed or owner is not piece.parameter,
                adam=part.optimizer,
                group=piece.group,
                host=piece.host,
            )
        return
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    adam = part.optimizer
    if isinstance(part, DistributedOptimizer):
        for parameter in part.model_param_gbuf_map:
            place = part._get_model_param_range_map(parameter)["param"]
            group_index, order = part.model_param_group_index_map[parameter]
            group = adam.param_groups[group_index]
            yield Fragment(
                parameter=parameter,
                dtype=parameter.dtype,
                main=group["params"][order],
                start=place.start,
                end=place.end,
                sharded=True,
                adam=adam,
                group=group,
            )
        return
    groups = {id(main): group for group in adam.param_groups for main in group["params"]}
    pairs = [(main, main) for group in adam.param_groups for main in group["params"]]
    if isinstance(part, Float16OptimizerWithFloat16Params):
        pairs = [(main, main) for group in part.fp32_from_fp32_groups for main in group]
        for parameters, mains in zip(part.float16_groups, part.fp32_from_float16_groups):
            pairs += list(zip(parameters, mains))
    for parameter, main in pairs:
        owner, start = _owner(parameter)
        yield Fragment(
            parameter=owner,
            dtype=part.config.params_dtype if owner is not parameter else parameter.dtype,
            main=main,
            start=start,
            end=start + parameter.numel(),
            sharded=owner is not parameter,
            adam=adam,
            group=groups[id(main)],
        )


def _owner(parameter: nn.Parameter) -> tuple[nn.Parameter, int]:
    """The parameter of the model that this is, or is some rows of (training/optimizer/sharded.py), and from which number on."""
    return getattr(parameter, "shard_of", (parameter, 0))


def _counts_per_parameter(adam: torch.optim.Optimizer) -> bool:
    """torch's AdamW does; Transformer Engine's and apex's fused ones keep one count per group."""
    return isinstance(adam, torch.optim.Adam | torch.optim.AdamW)


def _scalers(optimizer: Any) -> Iterator[Any]:
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        scaler = getattr(part, "grad_scaler", None)
        if isinstance(scaler, DynamicGradScaler):
            yield scaler
