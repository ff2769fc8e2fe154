"""What ranks receive of a step, and errors that reach all of them, over real gloo ranks."""

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.data.row import EncodedSample, Row, row_from_samples
from megatron_vlm.errors import DataError
from megatron_vlm.parallel.batch import any_rank, device_batch, share_rows, together
from megatron_vlm.parallel.config import ParallelConfig
from megatron_vlm.parallel.topology import Topology, build_topology
from megatron_vlm.testing.distributed import run_distributed

CPU = torch.device("cpu")


def rows(seed: int) -> list[Row]:
    """A row of two samples with images, and one of text alone with filler."""
    generator = torch.Generator().manual_seed(seed)

    def sample(key: str, length: int, shapes) -> EncodedSample:
        ids = torch.randint(5, 90, (length,), generator=generator)
        labels = torch.where(torch.arange(length) > 2, ids, -100)
        pixels = tuple(torch.randn(shape, generator=generator) for shape in shapes)
        positions = torch.arange(len(pixels) * 2)
        return EncodedSample(key=key, input_ids=ids, labels=labels, pixels=pixels, image_positions=positions)

    first = row_from_samples([sample(f"a{seed}", 9, [(3, 8, 16), (3, 24, 8)]), sample(f"ü{seed}", 6, [(3, 8, 8)])])
    return [first, row_from_samples([sample(f"c{seed}", 5, [])], multiple_of=4, holes=1)]


def topology_of(tp: int, pp: int) -> Topology:
    config = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    return build_topology(config, num_layers=pp, device=CPU)


def receive(tp: int, pp: int):
    """Runs on each rank: returns what it got, in plain form."""
    topology = topology_of(tp, pp)
    source = topology.is_source
    got, extra = share_rows(topology, rows(topology.dp_rank) if source else None, {"n": topology.dp_rank}, None)
    batches = [device_batch(topology, row, pixels=topology.first_stage, dtype=torch.float32) for row in got]
    return topology.dp_rank, topology.first_stage, source, got, extra, batches


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2), (2, 2, 1)])
def test_every_rank_receives_the_rows_of_its_replica(tp, pp, dp):
    for dp_rank, first_stage, source, got, extra, batches in run_distributed(receive, tp, pp, tp=tp, pp=pp, dp=dp):
        assert extra == {"n": dp_rank}
        for row, batch, wanted in zip(got, batches, rows(dp_rank), strict=True):
            for name in ("input_ids", "position_ids", "labels", "cu_seqlens", "image_positions"):
                assert torch.equal(getattr(row, name), getattr(wanted, name)), name
                assert getattr(row, name).dtype == getattr(wanted, name).dtype, name
            assert (row.keys, row.num_filler, row.holes) == (wanted.keys, wanted.num_filler, wanted.holes)
            assert [p.shape for p in row.pixels] == [p.shape for p in wanted.pixels]
            assert all(p.device.type == ("cpu" if source else "meta") for p in row.pixels)
            assert len(batch.pixels) == len(wanted.pixels)
            if first_stage:
                assert all(torch.equal(a, b) for a, b in zip(batch.pixels, wanted.pixels, strict=True))
            else:
                assert all(p.is_meta for p in batch.pixels)


def fail_on(rank: int, kind: str):
    topology = topology_of(2, 1)
    source = topology.is_source
    error = None
    if topology.rank == rank:
        error = DataError("unreadable image", key="k7", shard="s.tar", offset=512) if kind == "data" else KeyError("x")
    try:
        share_rows(topology, rows(0) if source else None, None, error)
    except Exception as caught:
        return type(caught).__name__, str(caught), getattr(caught, "echo", None)
    return None


def test_a_data_error_of_one_replica_is_raised_on_all_ranks():
    results = run_distributed(fail_on, 2, "data", tp=2, dp=2)
    assert {(kind, text) for kind, text, _ in results} == {
        ("DataError", "sample k7, in s.tar, at 512: unreadable image")
    }
    assert [echo for *_, echo in results] == [True, True, False, True]


def test_an_unexpected_error_stops_all_ranks_too():
    results = run_distributed(fail_on, 0, "bug", tp=2)
    assert results[0][0] == "KeyError"
    assert results[1] == ("MegatronVLMError", "rank 0 failed: KeyError: 'x'", True)


def local_work(failing: int | None):
    try:
        with together(CPU):
            if dist.get_rank() == failing:
                raise DataError("no such folder")
    except DataError as error:
        return str(error)
    return any_rank(dist.get_rank() == 1, CPU)


def test_together_raises_everywhere_or_nowhere():
    assert run_distributed(local_work, 1, dp=2) == ["no such folder"] * 2
    assert run_distributed(local_work, None, dp=2) == [True, True]
