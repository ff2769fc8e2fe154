"""Ranks, groups and sources of a grid, against megatron-core's own arithmetic and groups."""

import itertools

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.parallel_state import RankGenerator

from megatron_vlm.errors import ConfigError
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.grid import AXES, REPLICA, STAGE, Grid, replica_size, replicas
from megatron_vlm.parallel.topology import build_topology
from megatron_vlm.testing.distributed import run_distributed

GRIDS = [
    Grid(tp=tp, cp=cp, dp=dp, pp=pp)
    for tp, cp, dp, pp in itertools.product((1, 2, 3, 4), (1, 2, 3), (1, 2, 3), (1, 2, 3, 4))
]
SUBSETS = [axes for size in range(1, 5) for axes in itertools.combinations(AXES, size)]


def test_groups_are_megatron_cores():
    for grid in GRIDS:
        theirs = RankGenerator(grid.tp, 1, grid.dp, grid.pp, grid.cp, "tp-cp-ep-dp-pp")
        assert theirs.world_size == grid.world
        for axes in SUBSETS:
            wanted = [tuple(group) for group in theirs.get_ranks("-".join(axes))]
            assert sorted(grid.groups(*axes)) == sorted(wanted), (grid, axes)
            assert all(grid.group(rank, *axes) == group for group in wanted for rank in group), (grid, axes)


def test_coordinates_and_ranks_are_each_others_inverse():
    for grid in GRIDS:
        places = []
        for rank in range(grid.world):
            place = {axis: grid.coordinate(rank, axis) for axis in AXES}
            assert grid.rank(**place) == rank
            assert all(0 <= place[axis] < grid.size(axis) for axis in AXES)
            places.append(tuple(place.values()))
        assert len(set(places)) == grid.world


def test_sources_numbers_and_neighbours():
    for grid in GRIDS:
        for rank, axes in itertools.product(range(grid.world), SUBSETS):
            group = grid.group(rank, *axes)
            assert grid.source(rank, *axes) == group[0] and group[grid.number(rank, *axes)] == rank
            assert len(group) == grid.size(*axes)
        for rank, axis in itertools.product(range(grid.world), AXES):
            group, here = grid.group(rank, axis), grid.coordinate(rank, axis)
            for offset in (-1, 0, 1, 2):
                assert grid.neighbour(rank, axis, offset) == group[(here + offset) % len(group)]
            assert grid.first(rank, axis) == (rank == group[0]) and grid.last(rank, axis) == (rank == group[-1])


def test_a_known_grid():
    grid = Grid.of(16, tp=2, cp=2, pp=2)
    assert grid.name() == "tp 2 cp 2 pp 2 dp 2" and Grid.of(8, tp=2, pp=2).name() == "tp 2 pp 2 dp 2"
    assert [grid.coordinate(13, axis) for axis in AXES] == [1, 0, 1, 1]
    assert grid.group(13, *REPLICA) == (4, 5, 6, 7, 12, 13, 14, 15) and grid.source(13, *REPLICA) == 4
    assert grid.group(13, *STAGE) == tuple(range(8, 16))
    assert grid.number(13, "cp", "dp") == 2 and grid.group(13, "cp", "dp") == (9, 11, 13, 15)


@pytest.mark.parametrize(
    ("world", "sizes", "words"),
    [
        (6, {"tp": 2, "pp": 2}, "world size 6 is not a multiple of tensor x pipeline parallel size 2 x 2 = 4: start 4"),
        (12, {"tp": 2, "cp": 4}, "12 is not a multiple of tensor x context x pipeline parallel size 2 x 4 x 1 = 8"),
        (0, {}, "world size 0"),
    ],
)
def test_a_world_that_does_not_divide_is_refused(world, sizes, words):
    with pytest.raises(ConfigError, match=words):
        Grid.of(world, **sizes)


def test_all_grids_of_a_world():
    found = list(Grid.all(12))
    assert found[0] == Grid(dp=12) and found[-1] == Grid(tp=12)
    sizes = [
        (tp, cp, pp, dp) for tp, cp, pp, dp in itertools.product(range(1, 13), repeat=4) if tp * cp * pp * dp == 12
    ]
    assert [(grid.tp, grid.cp, grid.pp, grid.dp) for grid in found] == sizes


def test_a_section_as_it_is_written():
    parallel = {"tensor_model_parallel_size": "2", "pipeline_model_parallel_size": 3, "context_parallel_size": None}
    assert replica_size(parallel) == 6 and replicas(parallel, 12) == 2 and replicas(parallel, 4) == 1
    assert replica_size({"tensor_model_parallel_size": "many"}) == 1 and replica_size({}) == 1


def groups_of_a_rank(tp, pp):
    """On a rank: whether megatron-core's ranks, sizes and groups are the grid's."""
    config = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    topology = build_topology(config, num_layers=pp, device=torch.device("cpu"))
    grid, rank = topology.grid, topology.rank
    members = {
        topology.tp_group: ("tp",),
        topology.pp_group: ("pp",),
        topology.dp_group: ("dp",),
        topology.replica_group: REPLICA,
    }
    return (
        rank == dist.get_rank()
        and all(
            tuple(dist.get_process_group_ranks(group)) == grid.group(rank, *axes) for group, axes in members.items()
        )
        and (topology.tp_rank, topology.pp_rank, topology.dp_rank, topology.last_stage_source)
        == (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(),
            grid.rank(dp=topology.dp_rank, pp=pp - 1),
        )
    )


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 1), (2, 1, 2), (2, 2, 1), (1, 2, 2), (1, 4, 1)])
def test_the_groups_of_real_ranks(tp, pp, dp):
    assert all(run_distributed(groups_of_a_rank, tp, pp, tp=tp, pp=pp, dp=dp))
