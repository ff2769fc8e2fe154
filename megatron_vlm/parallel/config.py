"""ParallelConfig: how a model is laid over ranks, by its settings alone.

section ``parallel`` --grid--> Grid of the ranks; --stage_layers--> decoder layers of each stage
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.layers.context.attention import Exchange
from megatron_vlm.parallel.grid import COPIES, REPLICA, SETTINGS, Axis, Grid
from megatron_vlm.parallel.heartbeat import TIMEOUT
from megatron_vlm.parallel.place import START_TIMEOUT
from megatron_vlm.weights.stages import spread
from megatron_vlm.yaml_values import as_bool

Recomputed = Literal["core_attention", "mlp", "norm", "connector", "tower"]
"""What ``recompute_granularity: selective`` can recompute: parts of a decoder layer, the connector, the tower's layers."""


def check_recomputation(granularity: str | None, num_layers: int | None, modules: tuple[str, ...]) -> None:
    """Refuses settings of section ``parallel`` that contradict each other.

    Raises:
        ConfigError: one has no effect beside the others.
    """
    if num_layers is not None and (granularity != "full" or num_layers < 1):
        raise ConfigError(
            f"parallel.recompute_num_layers {num_layers} must be at least 1, and goes with recompute_granularity full, got "
            f"{granularity}: how many decoder layers of each stage are recomputed"
        )
    if modules and granularity != "selective":
        raise ConfigError(
            f"parallel.recompute_modules {', '.join(modules)} needs recompute_granularity selective, got {granularity}"
        )
    if len(set(modules)) < len(modules):
        raise ConfigError(f"parallel.recompute_modules names one twice: {', '.join(modules)}")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Config):
    """How a model is laid over ranks.

    Attributes:
        tensor_model_parallel_size: ranks that split each matrix (tp).
        pipeline_model_parallel_size: stages that split the layers (pp).
        decoder_layers_per_stage: decoder layers of each stage, 0 allowed, in order (of pp x n virtual stages: n per rank);
            ``auto``: so that the slowest stage is as fast as can be, tower, connector and head counted; None: even, or nearly.
        decoder_first_pipeline_num_layers, decoder_last_pipeline_num_layers: of these stages; the others share the rest.
        num_layers_per_virtual_pipeline_stage: layers per virtual stage, with ``auto`` in the mean; None: one stage per rank.
        sequence_parallel: split activations between tensor parallel regions along the sequence.
        context_parallel_size: ranks that split the tokens of each row (cp); attention still sees all of them.
        context_parallel_exchange: what these ranks exchange for it: ``gather``, the keys and values that each one's queries see;
            ``heads``, all tokens of some heads, where heads divide by tp x cp; ``auto``, heads from cp 8 on where they do.
        vision_parallel: who runs the tower: ``tensor``, all ranks of the first stage for all images, split over tensor parallel
            ranks; ``share``, each of these ranks for some images of a row, the tower whole; ``ahead``, all ranks of the replica,
            later stages too, each for some images of a step, before its rows run; ``auto``, ahead where that saves time and
            costs little memory (docs/long-rows.md), else dealt over cp ranks and split over tp.
        data_parallel_sharding: what data parallel (and context parallel) ranks share among them in place of holding all of it:
            ``none``; ``optimizer``, its state (ZeRO-1); ``gradients``, weights and gradients as well, weights whole from a
            forward pass to its backward pass (ZeRO-2); ``parameters``, weights whole for a layer's pass alone (ZeRO-3).
        sharding_group_size: ranks that share one copy of weights and gradients, copies being equal (hybrid sharding: those of a
            node); None: all of them.
        overlap_grad_reduce: reduce gradients while the backward pass runs; where weights are cut, that is always so.
        accumulate_allreduce_grads_in_fp32: keep and reduce gradients in fp32.
        ddp_bucket_size: elements of one gradient bucket; None: megatron-core's choice.
        recompute_granularity: None; ``full``: each layer of decoder and tower, and the connector, keep their input alone and are
            computed again in the backward pass; ``selective``: ``recompute_modules`` are.
        recompute_num_layers: with ``full``, only so many decoder layers of each stage, the first; None: all.
        recompute_modules: with ``selective``, of a decoder layer ``core_attention``, ``mlp``, ``norm``; ``connector``; ``tower``,
            each layer of it. Empty: core_attention, as in Megatron.
        offload: ``optimizer``: fp32 main parameters, AdamW's moments and its update are the host's; ``optimizer+parameters``: so
            are weights, frozen ones too, and their gradients, which come to the device for a layer's pass alone.
        offload_fraction: of the numbers that the optimizer holds, on the host.
        offload_activations: what is kept of a forward pass waits in the host's memory, parameters and small tensors left out.
        distributed_timeout_minutes: a collective that waits longer ends the run.
        heartbeat_timeout_seconds: a rank whose process gives no sign of life for longer ends the run, with the stacks of all.
        start_timeout_seconds: a start ends where ranks are missing and none more came for longer.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    decoder_layers_per_stage: tuple[int, ...] | Literal["auto"] | None = None
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    num_layers_per_virtual_pipeline_stage: int | None = None
    sequence_parallel: bool = False
    context_parallel_size: int = 1
    context_parallel_exchange: Exchange = "auto"
    vision_parallel: Literal["auto", "tensor", "share", "ahead"] = "auto"
    data_parallel_sharding: Literal["none", "optimizer", "gradients", "parameters"] = "none"
    sharding_group_size: int | None = None
    overlap_grad_reduce: bool = False
    accumulate_allreduce_grads_in_fp32: bool = True
    ddp_bucket_size: int | None = None
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_num_layers: int | None = None
    recompute_modules: tuple[Recomputed, ...] = ()
    offload: Literal["none", "optimizer", "optimizer+parameters"] = "none"
    offload_fraction: float = 1.0
    offload_activations: bool = False
    distributed_timeout_minutes: float = 30.0
    heartbeat_timeout_seconds: float = TIMEOUT
    start_timeout_seconds: float = START_TIMEOUT

    def __post_init__(self) -> None:
        for name in SETTINGS.values():
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name} must be at least 1, got {getattr(self, name)}")
        for name, least in (
            ("heartbeat_timeout_seconds", 2),
            ("start_timeout_seconds", 2),
            ("distributed_timeout_minutes", 0.1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"parallel.{name} must be at least {least}, got {getattr(self, name)}")
        if self.context_parallel_exchange != "auto" and self.context_parallel_size == 1:
            raise ConfigError(
                f"parallel.context_parallel_exchange {self.context_parallel_exchange} has no effect at context_parallel_size 1: "
                "drop it or raise context_parallel_size"
            )
        self._check_stages()
        if not 0 < self.offload_fraction <= 1 or (self.offload == "none" and self.offload_fraction != 1):
            raise ConfigError(
                f"parallel.offload_fraction must be above 0 and at most 1, and goes with offload optimizer, got "
                f"{self.offload_fraction} and {self.offload}"
            )
        if self.offloads_parameters and (self.data_parallel_sharding != "parameters" or self.offload_fraction != 1):
            raise ConfigError(
                "parallel.offload optimizer+parameters goes with data_parallel_sharding parameters, on one rank too, and all of "
                f"them, got {self.data_parallel_sharding} and offload_fraction {self.offload_fraction}"
            )
        check_recomputation(self.recompute_granularity, self.recompute_num_layers, self.recompute_modules)
        self._check_sharding()
        if self.vision_parallel in ("share", "ahead") and self.image_ranks == 1:
            more = "" if self.vision_parallel == "share" else " or pipeline_model_parallel_size"
            raise ConfigError(
                f"parallel.vision_parallel {self.vision_parallel} has no effect on one rank: drop it, or raise "
                f"tensor_model_parallel_size, context_parallel_size{more}"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "parallel.sequence_parallel has no effect at tensor_model_parallel_size 1: drop it or raise tp"
            )
        if self.num_layers_per_virtual_pipeline_stage is not None and self.pipeline_model_parallel_size == 1:
            raise ConfigError(
                "parallel.num_layers_per_virtual_pipeline_stage needs pipeline_model_parallel_size of at least 2, got 1"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None, where: str = "") -> Self:
        """As of any config; ``use_distributed_optimizer`` is the name that ``data_parallel_sharding: optimizer`` had before."""
        if not isinstance(data, Mapping) or "use_distributed_optimizer" not in data:
            return super().from_dict(data, where)
        old = as_bool(data["use_distributed_optimizer"])
        data = {key: value for key, value in data.items() if key != "use_distributed_optimizer"}
        given = data.get("data_parallel_sharding")
        if old is None or given == ("none" if old else "optimizer"):
            raise ConfigError(
                f"{where or 'parallel'}.use_distributed_optimizer true is data_parallel_sharding optimizer, and must be true or "
                f"false; got {old} beside {given}: leave it out"
            )
        return super().from_dict({"data_parallel_sharding": "optimizer" if old else "none"} | data, where)

    @property
    def fully_sharded(self) -> bool:
        """Weights are cut over data parallel ranks."""
        return self.data_parallel_sharding in ("gradients", "parameters")

    @property
    def offloads_parameters(self) -> bool:
        """Weights and gradients lie in the host's memory between passes."""
        return self.offload == "optimizer+parameters"

    def _check_sharding(self) -> None:
        size, what = self.sharding_group_size, f"parallel.data_parallel_sharding {self.data_parallel_sharding}"
        if size is not None and (size < 2 or not self.fully_sharded):
            raise ConfigError(
                f"parallel.sharding_group_size {size} must be at least 2, and goes with data_parallel_sharding gradients or "
                f"parameters, got {self.data_parallel_sharding}"
            )
        if not self.fully_sharded:
            return
        if self.pipeline_model_parallel_size > 1:
            host = " and offload optimizer" if self.offloads_parameters else ""
            stages = self.pipeline_model_parallel_size
            raise ConfigError(
                f"{what} with pipeline_model_parallel_size {stages} is not built: stages would gather their layers for each "
                f"microbatch. Set data_parallel_sharding optimizer{host}, or pipeline_model_parallel_size 1 (with "
                f"tensor_model_parallel_size {self.tensor_model_parallel_size * stages} where a layer is too large for a rank)"
            )
        if self.vision_parallel == "ahead":
            raise ConfigError(
                f"{what} with vision_parallel ahead is not built: ranks would gather the tower at different times; "
                "set vision_parallel share"
            )
        if self.ddp_bucket_size is not None:
            raise ConfigError(
                f"parallel.ddp_bucket_size has no effect with {what}: each layer is a bucket; leave it out"
            )

    @property
    def host_share(self) -> float:
        """Of what the optimizer holds, in the host's memory."""
        return 0.0 if self.offload == "none" else self.offload_fraction

    def grid(self, world: int) -> Grid:
        """How ``world`` ranks stand.

        Raises:
            ConfigError: they are not a multiple of a replica's, or sharding groups do not divide them.
        """
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        grid = Grid.of(world, tp=tp, cp=self.context_parallel_size, pp=pp)
        copies, size = grid.size(*COPIES), self.sharding_group_size
        if size is not None and copies % size:
            raise ConfigError(
                f"parallel.sharding_group_size {size} does not divide the {copies} ranks (data x context parallel) that share"
            )
        return grid

    @property
    def replica_size(self) -> int:
        """Ranks of one replica of the model."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size

    @property
    def image_axes(self) -> tuple[Axis, ...]:
        """Axes of the ranks that images are dealt over; over tp only where the tower is whole on each of these ranks."""
        dealt: dict[str, tuple[Axis, ...]] = {"tensor": (), "share": ("tp", "cp"), "ahead": REPLICA}
        return dealt.get(self.vision_parallel, ("cp",) if self.context_parallel_size > 1 else ())

    @property
    def image_ranks(self) -> int:
        """Ranks of a replica that images are dealt over; 1: they are not."""
        return math.prod(getattr(self, SETTINGS[axis]) for axis in self.image_axes)

    def _check_stages(self) -> None:
        given, pp = self.decoder_layers_per_stage, self.pipeline_model_parallel_size
        ends = {
            name: getattr(self, name)
            for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
            if getattr(self, name) is not None
        }
        others = [
            *ends,
            *(["num_layers_per_virtual_pipeline_stage"] if self.num_layers_per_virtual_pipeline_stage else []),
        ]
        if given == "auto":  # the layers of a virtual stage in the mean, which says how many there are
            others = list(ends)
        if given is not None and others:
            raise ConfigError(
                f"parallel.decoder_layers_per_stage and parallel.{others[0]} both say it: drop one of them"
            )
        if (given is not None or ends) and pp == 1:
            name = next(iter(ends), "decoder_layers_per_stage")
            raise ConfigError(f"parallel.{name} has no effect at pipeline_model_parallel_size 1: drop it or raise pp")
        for name, count in ends.items():
            if count < 0:
                raise ConfigError(f"parallel.{name} must be 0 or more, got {count}")
        if isinstance(given, tuple) and (not given or len(given) % pp or min(given) < 0):
            raise ConfigError(
                f"parallel.decoder_layers_per_stage {list(given)} must be one number of layers, 0 or more, for each of "
                f"{pp} stages (or of a multiple of that, with virtual stages)"
            )

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """Decoder layers of each virtual stage, in order; stage s is on pipeline rank s modulo pp. ``auto`` is taken for even.

        Raises:
            ConfigError: what is set does not give ``num_layers``.
        """
        pp, per, given = (
            self.pipeline_model_parallel_size,
            self.num_layers_per_virtual_pipeline_stage,
            self.decoder_layers_per_stage,
        )
        first, last = self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers
        if isinstance(given, tuple):
            if sum(given) != num_layers:
                raise ConfigError(
                    f"parallel.decoder_layers_per_stage {list(given)} are {sum(given)} layers, but the decoder has {num_layers}"
                )
            if idle := [rank for rank in range(1, pp - 1) if not sum(given[rank::pp])]:
                raise ConfigError(
                    f"parallel.decoder_layers_per_stage {list(given)} leaves stage {idle[0]} nothing to do: tower and "
                    "connector are whole on the first stage, the head is on the last. A tower too large for its stage is split "
                    "over tensor parallel ranks, or its images run on all ranks (parallel.vision_parallel=ahead)"
                )
            return given
        if per is not None:
            if num_layers % (pp * per):
                raise ConfigError(
                    f"{num_layers} decoder layers do not divide over {pp} pipeline stages of "
                    f"num_layers_per_virtual_pipeline_stage {per} layers each"
                )
            return (per,) * (num_layers // per)
        if num_layers < pp and given is None:
            raise ConfigError(
                f"{num_layers} decoder layers for pipeline_model_parallel_size {pp}: lower it, or say "
                "parallel.decoder_layers_per_stage with 0 for the first or the last"
            )
        rest = num_layers - (first or 0) - (last or 0)
        between = pp - (first is not None) - (last is not None)
        if rest < 0 or (rest and not between):
            raise ConfigError(
                f"{first or 0} layers on the first pipeline stage and {last or 0} on the last leave {rest} of {num_layers} for "
                f"{between} stages"
            )
        middle = spread(rest, [0.0] * between)
        return (*([first] if first is not None else []), *middle, *([last] if last is not None else []))

    def staged(self, layers: tuple[int, ...]) -> "ParallelConfig":
        """These with ``auto`` replaced by the layers of each virtual stage."""
        return self.replace(decoder_layers_per_stage=layers, num_layers_per_virtual_pipeline_stage=None)

    @property
    def virtual(self) -> bool:
        """Ranks have several stages each."""
        given = self.decoder_layers_per_stage
        listed = isinstance(given, tuple) and len(given) > self.pipeline_model_parallel_size
        return listed or self.num_layers_per_virtual_pipeline_stage is not None

    def virtual_size(self, num_layers: int) -> int:
        """Virtual stages per rank for a decoder of ``num_layers`` layers (1: none).

        Raises:
            ConfigError: as ``stage_layers``.
        """
        return len(self.stage_layers(num_layers)) // self.pipeline_model_parallel_size
