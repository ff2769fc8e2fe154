"""The pool of ranks: results by rank, failures by rank, deadlines, and that it goes on afterwards."""

import gc
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.testing.distributed import RankError, run_distributed
from megatron_vlm.testing.twins.small_families import write_small_twin


def gathered(offset, *, scale=1.0):
    value = torch.tensor([scale * (dist.get_rank() + offset)])
    parts = [torch.empty(1) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value)
    return os.getpid(), torch.get_num_threads(), torch.rand(3), torch.cat(parts)


def topology_of(tp, pp):
    from megatron_vlm.parallel.config import ParallelConfig
    from megatron_vlm.parallel.topology import build_topology

    config = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    topology = build_topology(config, num_layers=2, device=torch.device("cpu"))
    return topology.name(), topology.tp_rank, topology.pp_rank, topology.dp_rank


def fails_on(ranks, how):
    if dist.get_rank() in ranks:
        if how == "raise":
            raise ValueError(f"planned failure {dist.get_rank()}")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    dist.barrier()


def leaves_traces():
    os.environ["LEFT_BEHIND"] = "1"
    os.chdir("/")


def finds_traces():
    return os.environ.get("LEFT_BEHIND"), os.getcwd(), os.environ["RANK"], os.environ["WORLD_SIZE"]


def test_results_come_by_rank_and_workers_stay():
    first = run_distributed(gathered, 10, dp=2, scale=2.0)
    again = run_distributed(gathered, 10, tp=2, pp=2)
    assert [torch.equal(r[3], torch.tensor([20.0, 22.0])) for r in first] == [True, True]
    assert [r[3].tolist() for r in again] == [[10.0, 11.0, 12.0, 13.0]] * 4
    assert [r[0] for r in again[:2]] == [r[0] for r in first]
    assert all(r[1] == 1 for r in again)
    assert all(torch.equal(r[2], first[0][2]) for r in again)  # every call starts from the same seed


def test_topologies_follow_each_other():
    assert run_distributed(topology_of, 2, 1, tp=2) == [("tp 2 pp 1 dp 1", 0, 0, 0), ("tp 2 pp 1 dp 1", 1, 0, 0)]
    assert [r[1:] for r in run_distributed(topology_of, 1, 2, pp=2, dp=2)] == [
        (0, 0, 0),
        (0, 0, 1),
        (0, 1, 0),
        (0, 1, 1),
    ]
    assert run_distributed(topology_of, 1, 1) == [("tp 1 pp 1 dp 1", 0, 0, 0)]


def test_calls_leave_no_trace():
    run_distributed(leaves_traces, dp=2)
    assert run_distributed(finds_traces, dp=2) == [(None, os.getcwd(), str(rank), "2") for rank in range(2)]


def trained(directory, row, dtype):
    from megatron_vlm.testing.parity import wrapped_for_test
    from megatron_vlm.training.optimizer.config import OptimizerConfig
    from megatron_vlm.training.step import train_step

    parallel, options = {"data_parallel_sharding": "optimizer", "overlap_grad_reduce": True}, {"params_dtype": dtype}
    model, optimizer = wrapped_for_test(directory, parallel, options, None, OptimizerConfig(loss_scale=256.0))
    train_step(model, optimizer, [row, row])


def left_behind():
    from megatron.core.distributed import DistributedDataParallel

    return [type(found).__name__ for found in gc.get_objects() if isinstance(found, DistributedDataParallel)]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_run_leaves_no_model_and_so_no_threads_of_its_groups(tmp_path, dtype):
    """Each group that something holds keeps three threads, which wake a hundred times a second: a suite of them is slow."""
    twin = write_small_twin("internlm2", tmp_path)
    run_distributed(trained, twin.directory, twin.row([(0, 9)], seed=0), dtype, dp=2)
    assert run_distributed(left_behind, dp=2) == [[], []]


@pytest.mark.parametrize("ranks", [(0, 1), (1,)])
def test_errors_keep_the_pool(ranks):
    before = [r[0] for r in run_distributed(gathered, 0, dp=2)]
    with pytest.raises(RankError, match=r"rank 1 of 2(.|\n)*ValueError: planned failure 1") as error:
        run_distributed(fails_on, ranks, "raise", dp=2)
    assert error.value.ranks[0] in ranks and sorted(error.value.ranks) == [0, 1]
    assert [r[0] for r in run_distributed(gathered, 0, dp=2)] == before


def test_unpicklable_result_is_that_ranks_error():
    with pytest.raises(RankError, match="rank 0 of 1"):
        run_distributed(_returns_a_lambda)


def _returns_a_lambda():
    return lambda: None


def test_too_many_ranks():
    with pytest.raises(ValueError, match="= 16 ranks, but the pool has 8"):
        run_distributed(gathered, 0, tp=4, pp=2, dp=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, message", [("kill", "rank 1 of 2: died with exit code -9"), ("sleep", "no answer after 3 s")]
)
def test_lost_rank_is_named_and_the_pool_replaced(how, message):
    before = [r[0] for r in run_distributed(gathered, 0, dp=2)]
    with pytest.raises(RankError, match=message) as error:
        run_distributed(fails_on, (1,), how, dp=2, timeout=3)
    if how == "sleep":
        assert "fails_on" in str(error.value)  # the stack it slept in
    assert not any(_alive(pid) for pid in before)
    assert [r[3].tolist() for r in run_distributed(gathered, 0, dp=2)] == [[0.0, 1.0]] * 2


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
