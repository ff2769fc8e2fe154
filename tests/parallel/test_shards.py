"""What a rank holds of a parameter that is cut over ranks: rows that do not divide, and ranks without any."""

import torch
from torch import nn

from megatron_vlm.parallel.shards import held, put
from megatron_vlm.testing.distributed import run_distributed


def cut_on_a_rank(rows: tuple[int, ...]) -> list[tuple[int, list[float]]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    modules = nn.Sequential(*[nn.Linear(2, count, bias=False) for count in rows])
    fully_shard(modules, mesh=init_device_mesh("cpu", (4,)))
    found = []
    for module in modules:
        put(module.weight, torch.arange(module.weight.numel(), dtype=torch.float32).view(-1, 2))
        part, start = held(module.weight)
        found.append((start, part.flatten().tolist()))
    return found


def test_rows_of_each_rank():
    ranks = run_distributed(cut_on_a_rank, (8, 5, 1), dp=4)
    for number, rows in enumerate((8, 5, 1)):
        starts, parts = zip(*(found[number] for found in ranks))
        assert [value for part in parts for value in part] == list(range(2 * rows))
        assert all(part[0] == start for start, part in zip(starts, parts) if part)
    assert [len(found[1][1]) for found in ranks] == [4, 4, 2, 0] and ranks[3][1][0] == 10


def test_a_parameter_that_is_not_cut_is_held_whole():
    weight = nn.Parameter(torch.zeros(3, 2))
    put(weight, torch.ones(3, 2))
    part, start = held(weight)
    assert start == 0 and torch.equal(part, torch.ones(3, 2)) and part.data_ptr() == weight.data_ptr()
