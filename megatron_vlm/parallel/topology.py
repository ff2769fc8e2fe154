"""Parallel layout of a run: ParallelConfig -> Grid -> megatron-core groups -> one frozen Topology that is passed around.

The only file that imports megatron-core's parallel_state. What a rank's number means is ``grid.py``'s.
"""

import datetime
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.layers.context import Exchange
from megatron_vlm.parallel.grid import COPIES, REPLICA, SETTINGS, Grid
from megatron_vlm.parallel.heartbeat import TIMEOUT, Heartbeat
from megatron_vlm.parallel.place import START_TIMEOUT
from megatron_vlm.weights.stages import spread


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Config):
    """How a model is laid over ranks.

    Attributes:
        tensor_model_parallel_size: ranks that split each matrix (tp).
        pipeline_model_parallel_size: stages that split the layers (pp).
        decoder_layers_per_stage: decoder layers of each stage, 0 allowed, in order (of pp x n virtual stages: n per rank);
            ``auto``: so that the slowest stage is as fast as can be, tower, connector and head counted; None: even, or nearly.
        decoder_first_pipeline_num_layers, decoder_last_pipeline_num_layers: of these stages; the others share the rest.
        num_layers_per_virtual_pipeline_stage: layers per virtual stage; None: one stage per rank.
        sequence_parallel: split activations between tensor parallel regions along the sequence.
        context_parallel_size: ranks that split the tokens of each row (cp); attention still sees all of them.
        context_parallel_exchange: what these ranks exchange for it: ``gather``, the keys and values that each one's queries see;
            ``heads``, all tokens of some heads, where heads divide by tp x cp; ``auto``, heads from cp 8 on where they do.
        vision_parallel: who runs the tower for the images of a row: ``share``, each context parallel rank for some of them;
            ``tensor``, all of these ranks for all images, split over tensor parallel ranks alone; ``auto``, share where cp > 1.
        use_distributed_optimizer: shard optimizer state over data parallel ranks.
        overlap_grad_reduce: reduce gradients while the backward pass runs.
        accumulate_allreduce_grads_in_fp32: keep and reduce gradients in fp32.
        ddp_bucket_size: elements of one gradient bucket; None: megatron-core's choice.
        recompute_granularity: None, or "full": recompute each layer's activations in the backward pass.
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
    vision_parallel: Literal["auto", "tensor", "share"] = "auto"
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    accumulate_allreduce_grads_in_fp32: bool = True
    ddp_bucket_size: int | None = None
    recompute_granularity: Literal["full"] | None = None
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
        if self.vision_parallel == "share" and self.context_parallel_size == 1:
            raise ConfigError(
                "parallel.vision_parallel share has no effect at context_parallel_size 1: drop it or raise context_parallel_size"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "parallel.sequence_parallel has no effect at tensor_model_parallel_size 1: drop it or raise tp"
            )
        if self.num_layers_per_virtual_pipeline_stage is not None and self.pipeline_model_parallel_size == 1:
            raise ConfigError(
                "parallel.num_layers_per_virtual_pipeline_stage needs pipeline_model_parallel_size of at least 2, got 1"
            )

    def grid(self, world: int) -> Grid:
        """How ``world`` ranks stand.

        Raises:
            ConfigError: they are not a multiple of a replica's.
        """
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        return Grid.of(world, tp=tp, cp=self.context_parallel_size, pp=pp)

    @property
    def replica_size(self) -> int:
        """Ranks of one replica of the model."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size

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
        if given is not None and others:
            raise ConfigError(
                f"parallel.decoder_layers_per_stage and parallel.{others[0]} both say it: drop one of them"
            )
        if (given is not None or ends) and pp == 1:
            name = next(iter(ends), "decoder_layers_per_stage")
            raise ConfigError(f"parallel.{name} has no effect at pipeline_model_parallel_size 1: drop it or raise pp")
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
                "parallel.decoder_layers_per_stage, where 0 is allowed"
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


class SoloGroup:
    """Stands for a tensor parallel group of this rank alone: modules built with it hold full, replicated weights."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class Topology:
    """This rank in its grid, and its process groups.

    Attributes:
        grid: sizes of the axes.
        rank: this process's.
        vp: virtual stages per rank (1: none).
        layers: decoder layers of each virtual stage, in order.
        device: of this rank.
        tp_group, cp_group, pp_group, dp_group: ranks that differ from this one along that axis.
        copies_group: ranks that hold the same weights: cp x dp.
        stage_group: ranks of this stage of this replica: tp x cp.
        replica_group: ranks of this replica of the model: tp x cp x pp.
        embedding_group: first and last stage, which share a tied embedding.
        exchange: between the ranks of ``cp_group``.
        shares_images: each rank of ``cp_group`` encodes some of a row's images.
    """

    grid: Grid
    rank: int
    vp: int
    layers: tuple[int, ...]
    device: torch.device
    tp_group: Any
    pp_group: Any
    dp_group: Any
    replica_group: Any
    embedding_group: Any
    cp_group: Any
    copies_group: Any
    stage_group: Any
    exchange: Exchange = "auto"
    shares_images: bool = False

    @property
    def tp(self) -> int:
        return self.grid.tp

    @property
    def cp(self) -> int:
        return self.grid.cp

    @property
    def dp(self) -> int:
        return self.grid.dp

    @property
    def pp(self) -> int:
        return self.grid.pp

    @property
    def world_size(self) -> int:
        return self.grid.world

    @property
    def tp_rank(self) -> int:
        return self.grid.coordinate(self.rank, "tp")

    @property
    def cp_rank(self) -> int:
        return self.grid.coordinate(self.rank, "cp")

    @property
    def dp_rank(self) -> int:
        return self.grid.coordinate(self.rank, "dp")

    @property
    def pp_rank(self) -> int:
        return self.grid.coordinate(self.rank, "pp")

    @property
    def first_stage(self) -> bool:
        return self.grid.first(self.rank, "pp")

    @property
    def last_stage(self) -> bool:
        return self.grid.last(self.rank, "pp")

    @property
    def replica_size(self) -> int:
        """Ranks of one replica of the model."""
        return self.grid.size(*REPLICA)

    @property
    def replica_source(self) -> int:
        """Global rank of this replica's first on the first stage, which reads the data."""
        return self.grid.source(self.rank, *REPLICA)

    @property
    def last_stage_source(self) -> int:
        """Global rank of this replica's first on the last stage, which knows the loss."""
        return self.grid.neighbour(self.replica_source, "pp", -1)

    @property
    def is_source(self) -> bool:
        """This rank reads the data of its replica."""
        return self.rank == self.replica_source

    @property
    def copies(self) -> int:
        """Ranks that hold the same weights as this one, itself included."""
        return self.grid.size(*COPIES)

    @property
    def copy_number(self) -> int:
        """Which of them this one is."""
        return self.grid.number(self.rank, *COPIES)

    def name(self) -> str:
        """Sizes in words."""
        return self.grid.name() + (f" vp {self.vp}" if self.vp > 1 else "")


def init_process_group(
    device: torch.device,
    timeout_minutes: float = 30.0,
    heartbeat: Heartbeat | None = None,
    start_timeout: float = START_TIMEOUT,
) -> None:
    """Joins the process group that torchrun's variables describe (a group of one without them).

    Raises:
        TrainingError: a rank did not come, or is lost, before all have met.
    """
    if dist.is_initialized():
        return
    alone = os.environ.get("WORLD_SIZE", "1") == "1" and "MASTER_ADDR" not in os.environ
    if "RANK" not in os.environ or alone:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        store = dist.HashStore()
        dist.init_process_group(_backend(device), store=store, rank=0, world_size=1)
        return
    timeout = datetime.timedelta(minutes=timeout_minutes)
    joined = heartbeat.join(start_timeout) if heartbeat is not None else None
    if joined is None:
        dist.init_process_group(_backend(device), timeout=timeout)
        return
    joined.set_timeout(timeout)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(_backend(device), store=joined, rank=rank, world_size=world, timeout=timeout)


def build_topology(config: ParallelConfig, *, num_layers: int, device: torch.device) -> Topology:
    """Makes megatron-core's groups over the initialised process group.

    Args:
        config: the layout.
        num_layers: decoder layers, to derive the number of virtual stages.
        device: this rank's device.

    Raises:
        ConfigError: the world size does not match the layout; raised on every rank before any collective.
    """
    from megatron.core import parallel_state

    grid, rank = config.grid(dist.get_world_size()), dist.get_rank()
    layers = config.stage_layers(num_layers)
    vp = len(layers) // grid.pp
    destroy_topology()
    parallel_state.initialize_model_parallel(
        grid.tp,
        grid.pp,
        virtual_pipeline_model_parallel_size=vp if vp > 1 else None,
        context_parallel_size=grid.cp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=int(max(1, config.distributed_timeout_minutes)),
        order="tp-cp-ep-dp-pp",
    )
    return Topology(
        grid=grid,
        rank=rank,
        vp=vp,
        layers=layers,
        device=device,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        copies_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        stage_group=parallel_state.get_tensor_and_context_parallel_group(),
        replica_group=_replica_group(grid, rank) if grid.cp > 1 else parallel_state.get_model_parallel_group(),
        embedding_group=parallel_state.get_embedding_group(check_initialized=False),
        exchange=config.context_parallel_exchange,
        shares_images=grid.cp > 1 and config.vision_parallel != "tensor",
    )


def _replica_group(grid: Grid, rank: int) -> Any:
    """tp x cp x pp, which megatron-core has no group of. A collective of the job."""
    made = {ranks: dist.new_group(ranks) for ranks in map(tuple, grid.groups(*REPLICA))}
    return made[tuple(grid.group(rank, *REPLICA))]


def destroy_topology() -> None:
    """Closes megatron-core's groups; the process group itself stays."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return
    parallel_state.destroy_model_parallel()
    # It forgets them, and torch keeps them with two threads each: a hundred layouts in one process come to a standstill.
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"
