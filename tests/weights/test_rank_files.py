"""Rank files written by hand for a few splits, read back as full tensors and as shards of other splits."""

import dataclasses

import pytest
import torch

from megatron_vlm.errors import CheckpointError
from megatron_vlm.weights.mapping import COLUMN, GATED, REPLICATED, ROW, Split
from megatron_vlm.weights.rank_files import Piece, RankFile, RankFiles, rank_file_name

VOCAB = Split(dim=0, vocab_multiple=4)
LAYOUTS = {"norm": REPLICATED, "fc1": GATED, "fc2": ROW, "qkv": COLUMN, "embedding": VOCAB}
SHAPES = {"norm": (6,), "fc1": (16, 6), "fc2": (6, 8), "qkv": (12, 6), "embedding": (13, 6)}
MOMENTS = ("param", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def full():
    generator = torch.Generator().manual_seed(0)
    tensors = {
        (kind, name): torch.randn(shape, generator=generator)
        for name, shape in SHAPES.items()
        for kind in ("model", *MOMENTS)
    }
    for (kind, _), tensor in tensors.items():
        tensor.view(-1)[0] = -0.0  # a sum of zero-padded parts would lose the sign
        if kind == "model":
            tensors[kind, _] = tensor.bfloat16()
    return tensors


def write(directory, full, tp, dp, change=lambda rank, pieces, tensors: None, cut_weights=False):
    """Writes what tp x dp ranks own: weights from the last dp rank, or cut too, states cut at uneven places over dp ranks."""
    for rank in range(tp * dp):
        tp_rank, dp_rank = rank % tp, rank // tp
        pieces, tensors = {}, {}
        for name, split in LAYOUTS.items():
            if split.dim is None and tp_rank:
                continue
            shard = split.shard(full["model", name], tp, tp_rank)
            count = shard.numel()
            cuts = [0, *(count * i // dp - (i % 2) for i in range(1, dp)), count]
            start, end = cuts[dp_rank], cuts[dp_rank + 1]
            pieces[name] = Piece(
                name=name, shape=SHAPES[name], local_shape=tuple(shard.shape), split=split, start=start, step=3.0
            )
            if cut_weights:
                tensors["model", name] = shard.reshape(-1)[start:end]
            elif dp_rank == dp - 1:
                tensors["model", name] = shard
            for kind in MOMENTS:
                tensors[kind, name] = split.shard(full[kind, name], tp, tp_rank).reshape(-1)[start:end]
        change(rank, pieces, tensors)
        place = {"rank": rank, "world_size": tp * dp, "tp": tp, "tp_rank": tp_rank}
        RankFile(place=place, pieces=pieces.values(), tensors=tensors).write(directory)
    return directory


def same(a, b):
    """Equal bit for bit, signs of zeros included."""
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


@pytest.mark.parametrize("cut_weights", [False, True], ids=["whole", "fully sharded"])
@pytest.mark.parametrize("tp, dp", [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_full_tensors_and_shards_of_any_layout(tmp_path, full, tp, dp, cut_weights):
    with RankFiles(write(tmp_path, full, tp, dp, cut_weights=cut_weights)) as files:
        assert sorted(files.names()) == sorted(files.names("exp_avg")) == sorted(SHAPES)
        assert files.steps == dict.fromkeys(SHAPES, 3.0)
        for (kind, name), tensor in full.items():
            assert (files.info(name, kind).dtype, files.info(name, kind).shape) == (tensor.dtype, SHAPES[name])
            assert same(files.read(name, kind), tensor)
            for size in (1, 2):
                for rank in range(size):
                    shard = files.read_shard(name, LAYOUTS[name], size, rank, kind)
                    assert same(shard, LAYOUTS[name].shard(tensor, size, rank))


def test_a_layout_that_depends_on_tp(tmp_path, full):
    with RankFiles(write(tmp_path, full, 2, 1)) as files:
        assert same(files.read_shard("qkv", REPLICATED, 2, 1, "exp_avg"), full["exp_avg", "qkv"])
        other_padding = Split(dim=0, vocab_multiple=16)
        assert files.read_shard("embedding", other_padding, 2, 1).shape == (16, 6)


def drop(rank, key):
    def change(this, pieces, tensors):
        if this == rank:
            del tensors[key]

    return change


def shift(rank, name, by):
    def change(this, pieces, tensors):
        if this == rank:
            pieces[name] = dataclasses.replace(pieces[name], start=pieces[name].start + by)

    return change


def reshape(rank, name):
    def change(this, pieces, tensors):
        if this == rank:
            pieces[name] = dataclasses.replace(pieces[name], shape=(1, 2))

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (drop(3, ("exp_avg", "fc1")), r"exp_avg of fc1, tp rank 1: elements \[23, 48\) of 48 missing"),
        (drop(2, ("model", "qkv")), r"model of qkv, tp rank 0: elements \[0, 36\) of 36 missing"),
        (shift(2, "fc2", -2), r"param of fc2, tp rank 0: elements \[9, 11\) of 24 stored twice"),
        (shift(2, "fc2", 1), r"exp_avg of fc2, tp rank 0: elements \[11, 12\) of 24 missing"),
        (reshape(2, "norm"), "disagree on the shape of norm"),
    ],
)
def test_every_element_once_or_an_error_that_names_it(tmp_path, full, change, message):
    with pytest.raises(CheckpointError, match=message):
        RankFiles(write(tmp_path, full, 2, 2, change))


def test_a_whole_stage_missing_from_the_files_is_noticed(tmp_path, full):
    write(tmp_path, full, 2, 2)
    (tmp_path / rank_file_name(3)).unlink()
    with pytest.raises(CheckpointError, match=r"rank3\.safetensors does not exist"):
        RankFiles(tmp_path)


def test_files_of_other_ranks_or_runs_are_refused(tmp_path, full):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    write(tmp_path / "a", full, 2, 2)
    write(tmp_path / "b", full, 1, 2)
    (tmp_path / "b" / rank_file_name(1)).rename(tmp_path / "a" / rank_file_name(1))
    with pytest.raises(CheckpointError, match="mixes files"):
        RankFiles(tmp_path / "a")
    (tmp_path / "a" / rank_file_name(0)).rename(tmp_path / "a" / rank_file_name(1))
    (tmp_path / "a" / rank_file_name(2)).rename(tmp_path / "a" / rank_file_name(0))
    with pytest.raises(CheckpointError, match="was written by rank 2"):
        RankFiles(tmp_path / "a")


@pytest.mark.parametrize("place", [10, 400])
def test_a_damaged_header_is_a_checkpoint_error(tmp_path, full, place):
    write(tmp_path, full, 1, 1)
    path = tmp_path / rank_file_name(0)
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        RankFiles(tmp_path)


def test_a_truncated_file_is_a_checkpoint_error(tmp_path, full):
    write(tmp_path, full, 1, 1)
    path = tmp_path / rank_file_name(0)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        RankFiles(tmp_path)


def test_asking_for_what_is_not_stored(tmp_path, full):
    with (
        RankFiles(write(tmp_path, full, 1, 1, drop(0, ("param", "qkv")))) as files,
        pytest.raises(CheckpointError, match="holds no param of qkv"),
    ):
        files.read("qkv", "param")
