"""The loader: every sample once an epoch, the same for any number of ranks and workers, exact after every stop."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from itertools import islice

import numpy as np
import pytest
import torch

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images.pictures import decode_image
from megatron_vlm.data.row import IGNORE_INDEX
from megatron_vlm.data.shards.dataset import Dataset
from megatron_vlm.data.stream import loader as loader_module
from megatron_vlm.data.stream.loader import DataState, RowLoader, evaluation_rows
from megatron_vlm.errors import ConfigError, DataError

SIZE = 97
MODES = {
    "samples": {"packing": False, "seq_length": 256},
    "rows": {"packing": True, "seq_length": 96},
    "many windows": {"packing": True, "seq_length": 96, "packing_window": 30, "slice_size": 4, "window_slices": 5},
}


@pytest.fixture
def loader_of(digits_dir, make_processor):
    """``loader_of(mode, batch=, micro=, dp=, rank=, state=, ...) -> RowLoader``, closed at the end."""
    made = []

    def make(mode="rows", *, batch=4, micro=1, dp=1, rank=0, state=None, paths=None, seed=5, output_dir=None, **config):
        config = DataConfig(**{"num_workers": 0, **MODES[mode], **config})
        options = dict(global_batch_size=batch, micro_batch_size=micro, dp_rank=rank, dp_size=dp, state=state)
        made.append(
            RowLoader(
                config, make_processor(config), paths=paths or [digits_dir], seed=seed, output_dir=output_dir, **options
            )
        )
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def steps_of(loader, number):
    return [loader.next_step() for _ in range(number)]


def fields(row):
    tensors = (row.input_ids, row.position_ids, row.labels, row.cu_seqlens, row.image_positions, *row.pixels)
    return [t.tolist() for t in tensors], row.keys, row.num_filler, row.holes, row.truncated


@pytest.mark.parametrize("mode", MODES)
def test_every_sample_once_an_epoch(loader_of, mode):
    loader = loader_of(mode)
    seen = []
    while len(seen) < 3 * SIZE:
        step = loader.next_step()
        assert step.num_samples == len(step.sample_ids) == sum(len(row.keys) for row in step.rows)
        seen += step.sample_ids
        assert step.state.consumed_samples == len(seen)
    epochs = [seen[i * SIZE : (i + 1) * SIZE] for i in range(3)]
    assert all(sorted(epoch) == list(range(SIZE)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_rows_hold_what_the_processor_makes(loader_of, digits_dir, make_processor):
    processor, dataset = make_processor(DataConfig(**MODES["rows"])), Dataset([digits_dir])
    samples = {}
    for i in range(SIZE):
        raw = dataset.read(i)
        samples[raw.key] = processor.encode(raw.key, raw.turns, [decode_image(data) for data in raw.images])
    for step in steps_of(loader_of("rows"), 5):
        for row in step.rows:
            assert 0 < len(row.input_ids) <= 96 and row.num_filler == 0
            pixels = list(row.pixels)
            for key, start, end in zip(row.keys, row.cu_seqlens.tolist(), row.cu_seqlens.tolist()[1:]):
                sample = samples[key]
                assert torch.equal(row.input_ids[start:end], sample.input_ids)
                assert torch.equal(row.labels[start : end - 1], sample.labels[1:])
                assert row.labels[end - 1] == IGNORE_INDEX
                assert row.position_ids[start:end].tolist() == list(range(end - start))
                inside = row.image_positions[(row.image_positions >= start) & (row.image_positions < end)]
                assert torch.equal(inside - start, sample.image_positions)
                assert all(torch.equal(pixels.pop(0), p) for p in sample.pixels)
            assert not pixels


@pytest.mark.parametrize("mode, micro", [("samples", 1), ("samples", 2), ("rows", 1), ("many windows", 1)])
def test_steps_do_not_depend_on_the_number_of_ranks(loader_of, mode, micro):
    reference = steps_of(loader_of(mode, batch=8, micro=micro), 8)
    for dp in (2, 4):
        ranks = [steps_of(loader_of(mode, batch=8, micro=micro, dp=dp, rank=rank), 8) for rank in range(dp)]
        for number, step in enumerate(reference):
            here = [steps[number] for steps in ranks]
            assert {s.sample_ids for s in here} == {step.sample_ids} and {str(s.state) for s in here} == {
                str(step.state)
            }
            assert {len(s.rows) for s in here} == {8 // micro // dp}
            assert sorted(row.keys for s in here for row in s.rows) == sorted(row.keys for row in step.rows)


@pytest.mark.parametrize("mode", MODES)
def test_resume_at_every_step(loader_of, mode):
    whole = steps_of(loader_of(mode, batch=6), 40)
    assert whole[-1].state.epoch >= 1
    for number in range(0, 39):
        state = DataState.from_dict(json.loads(json.dumps(whole[number].state.to_dict())))
        resumed = steps_of(loader_of(mode, batch=6, state=state), 2)
        for ours, theirs in zip(resumed, whole[number + 1 :]):
            assert ours.sample_ids == theirs.sample_ids and ours.state == theirs.state
            assert [fields(row) for row in ours.rows] == [fields(row) for row in theirs.rows]


def test_chain_of_ranks_4_2_4(loader_of):
    whole = steps_of(loader_of("many windows", batch=8), 12)
    state, ids = None, []
    for dp in (4, 2, 4):
        ranks = [steps_of(loader_of("many windows", batch=8, dp=dp, rank=rank, state=state), 4) for rank in range(dp)]
        ids += [step.sample_ids for step in ranks[0]]
        state = ranks[-1][-1].state
    assert ids == [step.sample_ids for step in whole]


def own_children():
    """Children of this process but the ranks of the test pool, which live on between tests."""
    spawned = multiprocessing.get_context("spawn").Process
    return [child for child in multiprocessing.active_children() if isinstance(child, spawned)]


@pytest.mark.parametrize("num_workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_workers_change_nothing_and_end(loader_of, num_workers):
    alone = steps_of(loader_of("rows", batch=4), 6)
    loader = loader_of("rows", batch=4, num_workers=num_workers)
    together = steps_of(loader, 6)
    for ours, theirs in zip(together, alone):
        assert (ours.sample_ids, ours.state) == (theirs.sample_ids, theirs.state)
        assert [fields(row) for row in ours.rows] == [fields(row) for row in theirs.rows]
    workers = own_children()
    assert len(workers) == num_workers
    os.kill(workers[0].pid, signal.SIGTERM)  # a scheduler's warning: the run still needs rows to finish its step
    steps_of(loader, 6)
    loader.close()
    assert not [worker for worker in workers if worker.is_alive()]


SCRIPT = """
import sys, time
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.stream.loader import RowLoader
from megatron_vlm.models.families.idefics2.processor import Idefics2Processor

kept = []

def main():
    config = DataConfig(seq_length=96, packing=True, num_workers=2)
    processor = Idefics2Processor.from_pretrained(sys.argv[1], config)
    loader = RowLoader(config, processor, paths=[sys.argv[2]], seed=1, global_batch_size=2, micro_batch_size=1,
                       dp_rank=0, dp_size=1)
    kept.append(loader)
    loader.next_step()
    import multiprocessing
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[3] == "wait":
        time.sleep(600)

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "not closed"])
def test_no_worker_outlives_its_parent(tmp_path, idefics2_dir, digits_dir, end):
    (tmp_path / "run.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(tmp_path / "run.py"), str(idefics2_dir), str(digits_dir)]
    command.append("wait" if end == "killed" else "leave")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        if end == "killed":
            process.kill()
        process.wait(timeout=60)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(_runs(pid) for pid in pids):
        time.sleep(0.2)
    assert not [pid for pid in pids if _runs(pid)]


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_steps_per_epoch(loader_of):
    for mode, batch, epochs in (("samples", 6, 1), ("samples", 97, 2), ("samples", 4, 96 / 97), ("many windows", 4, 1)):
        loader = loader_of(mode, batch=batch)
        steps = steps_of(loader, loader.steps_per_epoch(epochs))
        reached = [sum(step.num_samples for step in steps[:end]) for end in (len(steps) - 1, len(steps))]
        assert reached[0] < round(epochs * SIZE) <= reached[1], (mode, reached)


def test_fill(digits_dir, make_processor):
    config = DataConfig(seq_length=96, packing=True, num_workers=0)
    options = dict(paths=[digits_dir], seed=1, global_batch_size=4, micro_batch_size=1, dp_rank=0, dp_size=1)
    processor = make_processor(config)
    for multiple_of, fill_to in ((8, 0), (1, 96), (8, 104)):
        loader = RowLoader(config, processor, multiple_of=multiple_of, fill_to=fill_to, **options)
        for row in loader.next_step().rows:
            assert len(row.input_ids) % multiple_of == 0 and (not fill_to or len(row.input_ids) == fill_to)
        loader.close()
    for bad in ({"multiple_of": 7}, {"fill_to": 95}, {"multiple_of": 8, "fill_to": 100}):
        with pytest.raises(ConfigError, match=r"fill|not a multiple of 7, .*: set it to 98"):
            RowLoader(config, processor, **bad, **options)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch": 6, "dp": 4}, "global_batch_size 6 is not a multiple of micro_batch_size 1 x 4"),
        ({"batch": 6, "micro": 2}, "with data.packing it must be 1"),
        ({"mode": "samples", "batch": 6, "micro": 4}, "not a multiple"),
        ({"batch": 0}, "at least 1"),
    ],
)
def test_batches_that_do_not_divide(loader_of, settings, message):
    with pytest.raises(ConfigError, match=message):
        loader_of(**settings)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 6}, "seed"),
        ({"packing_window": 50}, "packing"),
        ({"answer_loss_only": True}, "processor"),
        ({"paths": 2}, "data, mixture, excluded"),
        ({"on_too_long": "drop", "seq_length": 40}, "processor, excluded, packing"),
    ],
)
def test_a_state_of_other_data_is_refused(loader_of, digits_dir, change, named):
    state = loader_of("rows").next_step().state
    if "paths" in change:
        change = {"paths": [digits_dir, digits_dir]}
    with pytest.raises(ConfigError, match=f"{named} changed"):
        loader_of("rows", state=state, **change)
    step = loader_of("rows", state=state, allow_data_change=True, **change).next_step()
    assert step.state.consumed_samples == state.consumed_samples + step.num_samples
    assert step.state.digests != state.digests or step.state.seed != state.seed


def test_too_long_by_policy(loader_of, tmp_path, digits_dir, make_processor):
    processor = make_processor(DataConfig(seq_length=256))
    dataset = Dataset([digits_dir])
    lengths = np.array(
        [processor.count(s.turns, [(24, 24)] * len(s.images)).tokens for s in map(dataset.read, range(SIZE))]
    )
    limit = int(np.median(lengths))
    longer = int((lengths > limit).sum())
    assert 0 < longer < SIZE
    with pytest.raises(DataError, match=rf"{longer} of 97 samples have more than {limit} tokens.*digits-0000000"):
        loader_of("samples", seq_length=limit)

    loader = loader_of("samples", seq_length=limit, on_too_long="drop", output_dir=tmp_path)
    assert loader.report()["excluded"] == {"too_long": longer}
    assert loader.samples_per_epoch == SIZE - longer
    lines = [json.loads(line) for line in (tmp_path / "excluded.jsonl").read_text().splitlines()]
    assert len(lines) == longer and {line["reason"] for line in lines} == {"too_long"}
    used = {i for step in steps_of(loader, loader.steps_per_epoch()) for i in step.sample_ids}
    assert used == set(np.flatnonzero(lengths <= limit).tolist())
    assert {line["sample"] for line in lines} == {dataset.read(int(i)).key for i in np.flatnonzero(lengths > limit)}

    loader = loader_of("samples", seq_length=limit, on_too_long="truncate")
    report = loader.report()
    assert report["truncated"] + report["excluded"].get("too_long", 0) == longer and report["truncated"] > 0
    rows = [row for step in steps_of(loader, loader.steps_per_epoch()) for row in step.rows][: loader.samples_per_epoch]
    assert sum(row.truncated for row in rows) == report["truncated"]
    assert max(row.num_tokens for row in rows) == limit and min(row.num_supervised for row in rows) > 0


def test_over_max_images_are_counted(loader_of):
    loader = loader_of("rows", max_image_num=1)
    two = [i for i in range(SIZE) if i % 5 == 2 and i % 7 != 3]
    assert loader.report()["excluded"] == {"max_image_num": len(two)}
    assert loader.samples_per_epoch == SIZE - len(two)


def test_nothing_usable(loader_of):
    with pytest.raises(DataError, match="none of the 97 samples"):
        loader_of("rows", seq_length=4, on_too_long="drop")


@pytest.fixture
def damaged(tmp_path, digits_dir, loader_of):
    """A copy whose samples 21, 22 and 70 are damaged after their tokens were counted."""
    folder = tmp_path / "damaged"
    shutil.copytree(digits_dir, folder)
    loader_of("rows", paths=[folder])
    dataset = Dataset([folder])
    for sample_id in (21, 22, 70):
        shard, row = dataset.locate_one(sample_id)
        with dataset.shards[shard].path.open("r+b") as file:
            file.seek(int(dataset.index(shard)[row]["offset"]) + 520)
            file.write(b"#")
    return folder


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_bad_sample_raises_by_name(loader_of, damaged, num_workers):
    loader = loader_of("samples", paths=[damaged], num_workers=num_workers)
    with pytest.raises(DataError, match=r"shard-00000\d\.tar, at \d+: damaged: its crc32") as caught:
        steps_of(loader, 40)
    assert caught.value.offset is not None


@pytest.mark.parametrize("mode", ["samples", "rows"])
def test_bad_samples_become_holes_and_shift_nothing(loader_of, damaged, tmp_path, mode):
    sound = loader_of(mode)
    steps = steps_of(sound, sound.steps_per_epoch())
    loader = loader_of(mode, paths=[damaged], on_bad_sample="skip", output_dir=tmp_path)
    holes = 0
    for ours, theirs in zip(steps_of(loader, len(steps)), steps):
        assert ours.sample_ids == theirs.sample_ids and len(ours.rows) == len(theirs.rows)
        assert ours.state.replace(digests={}) == theirs.state.replace(digests={})
        for row, whole in zip(ours.rows, theirs.rows):
            holes += row.holes
            assert len(row.keys) + row.holes == len(whole.keys) and set(row.keys) <= set(whole.keys)
            if not row.keys:
                assert row.num_supervised == 0 and row.num_tokens == 0
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert holes == len(lines) == loader.report()["holes"]
    assert sorted(line["id"] for line in lines if line["epoch"] == 0) == [21, 22, 70]
    assert all("crc32" in line["reason"] and line["shard"].endswith(".tar") and line["offset"] >= 0 for line in lines)


@pytest.mark.parametrize("budget", [{"bad_sample_rate": 0.0002}, {"bad_sample_consecutive": 1, "slice_size": 1}])
def test_more_bad_samples_than_the_budget_stop_the_run(digits_dir, make_processor, damaged, budget, tmp_path):
    config = DataConfig(seq_length=256, num_workers=0, on_bad_sample="skip", **budget)
    rows = evaluation_rows(  # in the order of the shards, where 21 and 22 are neighbours
        config, make_processor(config), paths=[damaged], dp_rank=0, dp_size=1, micro_batch_size=1, output_dir=tmp_path
    )
    with pytest.raises(DataError, match=r"samples could not be used, 2 of them in a row.*quarantine\.jsonl"):
        list(rows)


def test_unreadable_when_counted(loader_of, damaged, make_processor, tmp_path):
    """Text that cannot be parsed is found while counting, before anything is trained on."""
    dataset = Dataset([damaged])
    shard, row = dataset.locate_one(50)
    with dataset.shards[shard].path.open("r+b") as file:
        file.seek(int(dataset.index(shard)[row]["offset"]) + 512)
        file.write(b"[")
    with pytest.raises(DataError, match="cannot be read"):
        loader_of("rows", paths=[damaged], max_image_num=9)
    loader = loader_of("rows", paths=[damaged], max_image_num=9, on_bad_sample="skip")
    assert loader.report()["excluded"]["unreadable"] >= 1


@pytest.mark.parametrize("packing, micro", [(False, 1), (False, 3), (True, 1)])
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_evaluation_reads_every_sample_once(digits_dir, make_processor, packing, micro, dp):
    config = DataConfig(seq_length=96, packing=packing, num_workers=0)
    ranks = [
        list(
            evaluation_rows(
                config, make_processor(config), paths=[digits_dir], dp_rank=rank, dp_size=dp, micro_batch_size=micro
            )
        )
        for rank in range(dp)
    ]
    assert len({len(rows) for rows in ranks}) == 1
    keys = [key for rows in ranks for row in rows for key in row.keys]
    assert sorted(keys) == [f"digits-{i:09d}" for i in range(SIZE)]
    empty = [row for rows in ranks for row in rows if not row.keys]
    assert len(empty) < dp and all(row.num_supervised == 0 and row.num_tokens == 0 for row in empty)


def test_evaluation_of_some_rows(digits_dir, make_processor):
    config = DataConfig(seq_length=96, num_workers=0)
    options = dict(paths=[digits_dir], micro_batch_size=1, max_rows=5)
    keys = []
    for rank in range(2):
        rows = list(evaluation_rows(config, make_processor(config), dp_rank=rank, dp_size=2, **options))
        assert len(rows) == 3
        keys += [key for row in rows for key in row.keys]
    assert sorted(keys) == [f"digits-{i:09d}" for i in range(5)]


def test_evaluation_decodes_images_in_full(digits_dir, make_processor, monkeypatch):
    seen = []
    reader = loader_module.RowReader
    monkeypatch.setattr(loader_module, "RowReader", lambda *a, **k: seen.append(a[2]) or reader(*a, **k))
    config = DataConfig(seq_length=96, num_workers=0, jpeg_scaled_decoding=True)
    options = dict(paths=[digits_dir], dp_rank=0, dp_size=1, micro_batch_size=1, max_rows=1)
    assert len(list(evaluation_rows(config, make_processor(config), **options))) == 1
    assert not seen[0].jpeg_scaled_decoding


@pytest.mark.slow
def test_evaluation_can_stop_early(digits_dir, make_processor, monkeypatch):
    monkeypatch.setattr(loader_module, "FEW", 0)
    config = DataConfig(seq_length=96, num_workers=1)
    rows = evaluation_rows(config, make_processor(config), paths=[digits_dir], dp_rank=0, dp_size=1, micro_batch_size=1)
    assert len(list(islice(rows, 2))) == 2 and len(own_children()) == 1
    rows.close()
    assert not own_children()
