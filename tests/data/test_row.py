"""Rows: samples end to end, there and back through workers and broadcast, and on a device."""

import json

import pytest
import torch

from megatron_vlm.data.row import EncodedSample, Row, pack_pixels, row_from_samples


def sample(length: int, images: int = 0, rank: int = 1, more: bool = False) -> EncodedSample:
    ids = torch.arange(length) + 10 * length
    return EncodedSample(
        key=f"s{length}",
        input_ids=ids,
        labels=ids.clone(),
        position_ids=torch.stack([torch.arange(length) * (i + 1) for i in range(3)]) if rank == 3 else None,
        pixels=tuple(torch.randn(3, 4 + i, 5) for i in range(images)),
        grids=tuple((1, 4 + i, 5) for i in range(images)),
        image_positions=torch.arange(images),
        more={"kinds": torch.ones(2, length, dtype=torch.int32)} if more else {},
    )


def same(a: Row, b: Row) -> bool:
    tensors = all(torch.equal(a.tokens[n], b.tokens[n]) and a.tokens[n].dtype == b.tokens[n].dtype for n in a.tokens)
    rest = all(getattr(a, n) == getattr(b, n) for n in ("starts", "grids", "keys", "num_filler", "holes", "truncated"))
    numbers = all(
        torch.equal(getattr(a, n), getattr(b, n)) for n in ("cu_seqlens", "loss_positions", "image_positions")
    )
    return tensors and rest and numbers and a.tokens.keys() == b.tokens.keys()


def test_samples_end_to_end():
    row = row_from_samples([sample(3, 1), sample(4, 2)], filler_token_id=7, multiple_of=5, holes=2)
    assert row.input_ids.tolist() == [30, 31, 32, 40, 41, 42, 43, 7, 7, 7]
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2]
    assert row.labels.tolist() == [31, 32, -100, 41, 42, 43, -100, -100, -100, -100]
    assert row.starts == (0, 3, 7, 10) and row.cu_seqlens.tolist() == [0, 3, 7, 10] and row.segments == (3, 4, 3)
    assert row.image_positions.tolist() == [0, 3, 4] and len(row.pixels) == 3 and row.grids[2] == (1, 5, 5)
    assert row.loss_positions.tolist() == [0, 1, 3, 4, 5] and row.num_supervised == 5
    assert (row.num_tokens, row.num_filler, row.holes, row.keys) == (7, 3, 2, ("s3", "s4"))


def test_a_row_of_holes_is_filler():
    row = row_from_samples([], filler_token_id=7, fill_to=4, holes=1)
    assert row.input_ids.tolist() == [7] * 4 and row.num_supervised == 0 and row.num_tokens == 0


def test_positions_of_any_rank_and_further_tensors():
    """Three positions a token, as families with positions in time, height and width have them, and what a family adds."""
    row = row_from_samples([sample(2, rank=3, more=True), sample(3, rank=3, more=True)], multiple_of=4)
    assert row.position_ids.tolist()[2] == [0, 3, 0, 3, 6, 0, 1, 2]
    assert row.tokens["kinds"].tolist() == [[1] * 5 + [0] * 3] * 2
    assert row.slice(torch.tensor([0, 4])).position_ids.tolist() == [[0, 2], [0, 4], [0, 6]]


def test_a_slice_knows_which_features_it_takes():
    row = row_from_samples([sample(3, 1), sample(4, 2)], multiple_of=4)  # images at 0, 3 and 4
    part = row.slice(torch.tensor([1, 4, 5, 6]))
    assert part.part is not None and part.part[0].tolist() == [2] and part.part[1] == 3
    assert part.image_positions.tolist() == [1] and torch.equal(part.input_ids, row.input_ids[[1, 4, 5, 6]])
    assert part.labels[part.loss_positions].ne(-100).all() and part.num_supervised == int((part.labels != -100).sum())
    assert (part.starts, part.keys, len(part.pixels)) == (row.starts, row.keys, 3)
    halves = [row.slice(torch.arange(half, half + 4)) for half in (0, 4)]
    assert sum(half.num_supervised for half in halves) == row.num_supervised


@pytest.mark.parametrize("make", [
    lambda: row_from_samples([sample(3, 1), sample(4, 2)], multiple_of=5, holes=1),
    lambda: row_from_samples([sample(5, 2, rank=3, more=True)], multiple_of=8),
    lambda: row_from_samples([], fill_to=3),
])  # fmt: skip
def test_there_and_back(make):
    row = make()
    header, numbers = row.pack()
    header = json.loads(json.dumps(header))
    again = Row.unpack(header, numbers, pack_pixels(row.pixels))
    assert same(again, row) and all(torch.equal(a, b) for a, b in zip(again.pixels, row.pixels, strict=True))
    bare = Row.unpack(header, numbers)
    assert same(bare, row) and [p.shape for p in bare.pixels] == [p.shape for p in row.pixels]
    assert all(p.is_meta for p in bare.pixels)


def test_pixels_travel_in_the_models_dtype():
    row = row_from_samples([sample(3, 2)])
    moved = row.to("cpu", torch.bfloat16)
    assert same(moved, row) and all(torch.equal(a, b.bfloat16()) for a, b in zip(moved.pixels, row.pixels, strict=True))
    assert pack_pixels(row.pixels, torch.bfloat16).nbytes * 2 == pack_pixels(row.pixels).nbytes
    assert all(p.is_meta for p in row.to("cpu", pixels=False).pixels)


def test_runs_of_images_are_known_on_the_host():
    """Neighbours are one run, two samples' never; kept where a row travels, and the whole row's in a slice."""
    samples = [sample_of(9, [0, 1, 4, 5, 6, 8]), sample_of(4, [0, 1]), sample_of(3, [])]
    row = row_from_samples(samples, multiple_of=5)
    wanted = ((0, 2), (4, 7), (8, 9), (9, 11))
    assert row.runs == wanted == Row.unpack(*row.pack()).runs == row.to("cpu").runs
    assert row.slice(torch.tensor([0, 5, 9])).runs == wanted
    assert row_from_samples([samples[2]]).runs == ()


def sample_of(length, images):
    ids = torch.arange(length)
    return EncodedSample(key="k", input_ids=ids, labels=ids, image_positions=torch.tensor(images, dtype=torch.int64))
