"""The same real samples packed, one to a row and two to a row: the same token-weighted loss and gradients."""

import pytest

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.stream.loader import RowLoader
from megatron_vlm.models.families.idefics2.processor import Idefics2Processor
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import gradient_errors, layout_run

SAMPLES = 10
BAR = 1e-5  # measured: loss 2e-8, gradients 2.3e-6 (norm of the difference over the norm)


@pytest.fixture(scope="module")
def rows_of(twin, train_data):
    """``rows_of(kind) -> rows``: the first window of the training order, SAMPLES samples, laid out in one of the ways."""

    def make(kind):
        packing, micro = kind == "packed", 2 if kind == "two to a row" else 1
        config = DataConfig(seq_length=96, packing=packing, packing_window=SAMPLES, num_workers=0, shortest_edge=24)
        processor = Idefics2Processor.from_pretrained(twin, config)
        options = dict(paths=[train_data], seed=4, micro_batch_size=micro, dp_rank=0, dp_size=1)
        loader = RowLoader(config, processor, global_batch_size=micro, **options)
        rows, seen = [], 0
        while seen < SAMPLES:
            step = loader.next_step()
            rows += step.rows
            seen += step.num_samples
        loader.close()
        assert seen == SAMPLES
        return rows

    return make


def test_packed_equals_unpacked(twin, rows_of):
    rows = {kind: rows_of(kind) for kind in ("alone", "packed", "two to a row")}
    assert [len(r) for r in rows.values()] == [10, len(rows["packed"]), 5] and 1 < len(rows["packed"]) < 8
    keys = {kind: sorted(key for row in r for key in row.keys) for kind, r in rows.items()}
    assert keys["alone"] == keys["packed"] == keys["two to a row"] and len(keys["alone"]) == SAMPLES
    assert 0 < sum(len(row.pixels) == 0 for row in rows["alone"]) < SAMPLES

    (reference,) = run_distributed(layout_run, str(twin), rows["alone"], {}, {})
    for kind in ("packed", "two to a row"):
        (ours,) = run_distributed(layout_run, str(twin), rows[kind], {}, {})
        assert ours["loss"] == pytest.approx(reference["loss"], rel=BAR)
        errors = gradient_errors(ours["grads"], reference["grads"])
        print(kind, abs(ours["loss"] / reference["loss"] - 1), max(errors.values()))
        assert max(errors.values()) < BAR, {name: error for name, error in errors.items() if error >= BAR}
