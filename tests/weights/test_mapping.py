"""Layouts and entries are exact inverses, for every size that divides, and say so where one does not."""

import pytest
import torch

from megatron_vlm.errors import ConversionError
from megatron_vlm.weights.mapping import (
    COLUMN,
    GATED,
    GROUPS,
    REPLICATED,
    ROW,
    VOCAB,
    Mapping,
    Prefixes,
    Split,
    direct,
    gated,
    group_of,
    qkv,
)

SHAPES = [(48, 40), (16, 8), (8, 24), (2400, 8)]


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("split", [REPLICATED, COLUMN, ROW, GATED], ids=["replicated", "column", "row", "gated"])
def test_merge_inverts_split(split, shape, tp):
    full = torch.arange(shape[0] * shape[1]).reshape(shape)
    if split.dim is not None and shape[split.dim] % (tp * split.stride):
        with pytest.raises(ConversionError, match="does not divide"):
            split.shards(full, tp)
        return
    shards = split.shards(full, tp)
    assert len(shards) == tp
    assert torch.equal(split.merge(shards), full)
    if split.dim is not None:
        assert all(shard.shape[split.dim] == shape[split.dim] // tp for shard in shards)


def test_a_gated_shard_holds_the_same_rows_of_gate_and_up():
    full = torch.arange(16)[:, None]
    assert [shard[:, 0].tolist() for shard in GATED.shards(full, 2)] == [
        [0, 1, 2, 3, 8, 9, 10, 11],
        [4, 5, 6, 7, 12, 13, 14, 15],
    ]


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("rows", [1, 7, 32, 33, 401])
@pytest.mark.parametrize("multiple, extra", [(1, 0), (8, 0), (128, 0), (8, 5), (1, 3)])
def test_vocabulary_is_padded_with_zeros_and_comes_back(rows, tp, multiple, extra):
    split = Split(dim=0, vocab_multiple=multiple, vocab_extra=extra)
    full = torch.rand(rows, 3) + 1
    shards = split.shards(full, tp)
    padded = torch.cat(shards)
    assert len({shard.shape for shard in shards}) == 1
    assert len(padded) == split.padded(rows, tp) and len(padded) % (multiple * tp) == 0
    assert rows + extra <= len(padded) < rows + extra + multiple * tp
    assert torch.equal(padded[:rows], full) and not padded[rows:].any()
    assert torch.equal(split.merge(shards, rows), full)


def test_a_map_is_padded_where_it_holds_rows_of_the_vocabulary():
    entries = (direct("embedding", "e", VOCAB), direct("fc2", "f", ROW))
    padded = Mapping(entries=entries, vocab_size=33).padded(8, 5)
    assert [entry.split for entry in padded] == [Split(dim=0, vocab_multiple=8, vocab_extra=5), ROW]
    assert padded.by_name()["embedding"].split.padded(33, 2) == 48 and VOCAB.padded(33, 2) == 34


def test_replicas_that_differ_are_refused():
    with pytest.raises(ConversionError, match="ranks 0 and 1"):
        REPLICATED.merge([torch.zeros(2), torch.ones(2)])


@pytest.mark.parametrize("heads, groups", [(8, 8), (8, 2), (6, 3), (16, 1)])
@pytest.mark.parametrize("tail", [(), (5,)], ids=["bias", "weight"])
def test_qkv_is_group_major_and_comes_back(heads, groups, tail):
    dim = 3
    entry = qkv("full", ["q", "k", "v"], num_heads=heads, num_query_groups=groups)
    parts = [torch.rand(n * dim, *tail) for n in (heads, groups, groups)]
    full = entry.to_full(parts)
    per_group = full.reshape(groups, heads // groups + 2, dim, *tail)
    q, k, v = (part.reshape(groups, -1, dim, *tail) for part in parts)
    assert torch.equal(per_group[:, :-2], q)
    assert torch.equal(per_group[:, -2:-1], k) and torch.equal(per_group[:, -1:], v)
    assert all(torch.equal(back, part) for back, part in zip(entry.from_full(full), parts, strict=True))


def test_gated_comes_back():
    entry = gated("full", ["gate", "up"])
    parts = [torch.rand(6, 4), torch.rand(6, 4)]
    assert all(torch.equal(a, b) for a, b in zip(entry.from_full(entry.to_full(parts)), parts, strict=True))


@pytest.mark.parametrize("entries", [(direct("a", "x"), direct("a", "y")), (direct("a", "x"), direct("b", "x"))])
def test_a_name_used_twice_is_refused(entries):
    with pytest.raises(ConversionError, match="twice"):
        Mapping(entries=entries, vocab_size=1)


@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2)])
def test_qkv_in_one_tensor_is_three_end_to_end(heads, groups):
    parts = [torch.randn(count * 3, 5) for count in (heads, groups, groups)]
    apart = qkv("x", ["q", "k", "v"], num_heads=heads, num_query_groups=groups)
    joined = qkv("x", ["qkv"], num_heads=heads, num_query_groups=groups)
    full = joined.to_full([torch.cat(parts)])
    assert torch.equal(full, apart.to_full(parts))
    (back,) = joined.from_full(full)
    assert torch.equal(back, torch.cat(parts))


def test_the_longest_prefix_holds_and_of_equal_ones_the_first():
    names = Prefixes((("model.a.", "a.b."), ("model.a.b.", "a.b."), ("a.", "a.b."), ("head", "c.head")))
    files = {"model.a.x": "a.b.x", "model.a.b.x": "a.b.x", "a.x": "a.b.x", "head.w": "c.head.w", "other": "other"}
    assert {name: names.file_name(name) for name in files} == files
    assert [names.module_name(name) for name in ("a.b.x", "c.head", "other")] == ["model.a.x", "head", "other"]


def test_parameters_belong_to_one_group():
    assert {group_of(prefix + "x.weight") for prefix in GROUPS.values()} == set(GROUPS)
    with pytest.raises(ValueError, match=r"'head\.weight' belongs to no group"):
        group_of("head.weight")
