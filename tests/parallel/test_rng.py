"""Random numbers of a step depend on (seed, iteration, place) alone."""

import torch

from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.rng import derive_seed, seed_step
from megatron_vlm.parallel.topology import build_topology
from megatron_vlm.testing.distributed import run_distributed


def draw(tp: int, pp: int, iterations):
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    config = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    topology = build_topology(config, num_layers=pp, device=torch.device("cpu"))
    drawn = []
    for iteration in iterations:
        seed_step(topology, 7, iteration)
        with get_cuda_rng_tracker().fork():
            split = torch.rand(1).item()
        drawn.append((torch.rand(1).item(), split))
    return drawn


def test_a_step_draws_the_same_after_a_resume():
    whole = run_distributed(draw, 2, 1, [0, 1, 2], tp=2)
    resumed = run_distributed(draw, 2, 1, [2], tp=2)
    assert [numbers[2] for numbers in whole] == [numbers[0] for numbers in resumed]
    assert whole[0][0] != whole[0][1]


def test_tensor_parallel_ranks_share_the_default_generator_only():
    (a,), (b,) = run_distributed(draw, 2, 1, [0], tp=2)
    assert a[0] == b[0]
    assert a[1] != b[1]


def test_stages_and_replicas_draw_differently():
    for layout in ({"pp": 2}, {"dp": 2}):
        (a,), (b,) = run_distributed(draw, 1, layout.get("pp", 1), [0], **layout)
        assert a[0] != b[0]


def test_derived_seeds_differ_and_fit():
    seeds = {derive_seed(seed, step, 0, 0) for seed in range(20) for step in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)
