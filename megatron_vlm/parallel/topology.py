"""Parallel layout of a run: ParallelConfig -> Grid -> megatron-core groups -> one frozen Topology that is passed around.

The only file that imports megatron-core's parallel_state. What a rank's number means is ``grid.py``'s.
"""

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.layers.context.attention import Exchange
from megatron_vlm.layers.solo import SoloGroup
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.grid import COPIES, REPLICA, Axis, Grid
from megatron_vlm.parallel.heartbeat import Heartbeat
from megatron_vlm.parallel.place import START_TIMEOUT


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
        exchange: between the ranks of ``cp_group``.
        image_axes: of the ranks that images are dealt over; none: every rank of the first stage encodes all.
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
    cp_group: Any
    copies_group: Any
    stage_group: Any
    exchange: Exchange = "auto"
    image_axes: tuple[Axis, ...] = ()

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
    def encodes_ahead(self) -> bool:
        """All images of a step are encoded before its schedule, on all ranks of the replica: each stage holds a tower."""
        return "pp" in self.image_axes

    @property
    def shares_images(self) -> bool:
        """Each rank of the first stage encodes some of a row's images."""
        return bool(self.image_axes) and not self.encodes_ahead

    @property
    def whole_tower(self) -> bool:
        """Tower and connector are whole on every tensor parallel rank, which encode other images each."""
        return "tp" in self.image_axes and self.tp > 1

    @property
    def tower_group(self) -> Any:
        """Ranks that tower and connector are split over."""
        return SoloGroup() if self.whole_tower else self.tp_group

    @property
    def image_group(self) -> Any:
        """Ranks that images are dealt over."""
        return {1: self.cp_group, 2: self.stage_group, 3: self.replica_group}[len(self.image_axes)]

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
        exchange=config.context_parallel_exchange,
        image_axes=config.image_axes,
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
    """Beside a GPU, tensors of the host travel by gloo: what ranks tell each other between steps waits for no kernel."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
