"""Workers: rows come in order, what is made ahead stays within its bounds, and a worker's end or error is told."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.plan import RowPlan
from megatron_vlm.data.reader import Fetched
from megatron_vlm.data.types import PackedRow
from megatron_vlm.data.workers import Rows

MIB = 2**20


class Maker:
    """Makes rows of ``mib`` MiB of pixels and leaves a file for each; odd ones take longer; plan 99 is a bug."""

    def __init__(self, folder, mib):
        self.folder, self.mib = folder, mib

    def __getitem__(self, plan):
        number = plan.ids[0]
        if number == 99:
            raise KeyError("a bug")
        time.sleep(0.02 * (number % 2))
        Path(self.folder, str(number)).touch()
        ids = torch.tensor([number])
        pixels = (torch.full((1, self.mib * MIB // 4, 1), float(number)),)
        return Fetched(row=PackedRow(input_ids=ids, position_ids=ids, labels=ids, cu_seqlens=ids, pixels=pixels))


def plans_of(numbers):
    return (RowPlan(ids=(n,), tokens=(1,), epoch=0) for n in numbers)


@pytest.mark.parametrize(
    "mib, bound, ahead",
    [(2, 8, 4), *(pytest.param(*case, marks=pytest.mark.full) for case in ((1, 1000, 12), (16, 8, 1)))],
)
def test_rows_ahead_are_bounded_by_bytes_and_by_number(tmp_path, mib, bound, ahead):
    config = DataConfig(seq_length=8, num_workers=2, prefetch_rows=6, prefetch_mb=bound)
    rows = Rows(Maker(tmp_path, mib), plans_of(range(24)), config)
    made = []
    for number in range(20):
        item = next(rows)
        assert item.row.input_ids.tolist() == [number] and float(item.row.pixels[0][0, -1, 0]) == number
        if number in (4, 9):
            time.sleep(1.0)
            made.append(len(list(tmp_path.iterdir())) - number - 1)
    assert ahead - 1 <= max(made) <= ahead, made
    assert [item.row.input_ids.item() for item in rows] == [20, 21, 22, 23]
    rows.close()


def test_a_bug_and_a_killed_worker_are_told(tmp_path):
    config = DataConfig(seq_length=8, num_workers=1, prefetch_rows=1)
    rows = Rows(Maker(tmp_path, 1), plans_of([0, 99, 1, 2, 3]), config)
    next(rows)
    with pytest.raises(RuntimeError, match="a bug"):
        next(rows)
    rows.close()
    rows = Rows(Maker(tmp_path, 1), plans_of(range(9)), config)
    next(rows)
    os.kill(rows._workers[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="ended with exit code -9"):
        list(rows)
    rows.close()
