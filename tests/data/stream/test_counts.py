"""Token counts: made once per fingerprint, kept beside the shards or in a cache, right when many make them at once."""

import hashlib
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images.pictures import decode_image
from megatron_vlm.data.shards.dataset import Dataset
from megatron_vlm.data.stream import counts
from megatron_vlm.data.stream.counts import NO_LIMIT, TokenCounts, check_share, survey
from megatron_vlm.errors import ConfigError, DataError, Reason


@pytest.fixture
def folder(tmp_path, digits_dir):
    shutil.copytree(digits_dir, tmp_path / "shards", ignore=shutil.ignore_patterns("*.tokens.npy"))
    return tmp_path / "shards"


@pytest.fixture(scope="module")
def processor(make_processor):
    return make_processor(DataConfig(seq_length=256, answer_loss_only=True))


def test_counts_are_those_of_encoding(folder, processor):
    dataset = Dataset([folder])
    table = TokenCounts(dataset, processor)(np.arange(len(dataset)))
    for sample_id, count in enumerate(table):
        raw = dataset.read(sample_id)
        sample = processor.encode(raw.key, raw.turns, [decode_image(data) for data in raw.images])
        assert count["tokens"] == len(sample.input_ids) and count["image_tokens"] == len(sample.image_positions)
        assert count["supervised"] == (sample.labels[1:] != -100).sum() and count["reason"] == 0
        assert count["patches"] == sum((p.shape[1] // 8) * (p.shape[2] // 8) for p in sample.pixels)
    scattered = np.array([96, 3, 50, 3, 20])
    assert (TokenCounts(dataset, processor)(scattered) == table[scattered]).all()


def test_made_once_per_fingerprint(folder, processor, make_processor):
    dataset = Dataset([folder])
    TokenCounts(dataset, processor)
    files = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.tokens.npy")}
    assert len(files) == 5
    TokenCounts(dataset, processor)
    assert files == {p.name: p.stat().st_mtime_ns for p in folder.glob("*.tokens.npy")}
    shards = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.glob("shard-??????.*")}
    TokenCounts(dataset, make_processor(DataConfig(seq_length=128)))
    assert len(list(folder.glob("*.tokens.npy"))) == 10
    shortest = {"seq_length": 28, "answer_loss_only": True}
    TokenCounts(dataset, make_processor(DataConfig(**shortest, on_too_long="truncate")))
    assert len(list(folder.glob("*.tokens.npy"))) == 15
    after = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.glob("shard-??????.*")}
    assert {name: after[name] for name in shards} == shards  # other settings rewrite no shard and no index


def test_limits_are_laid_on_counts_not_kept_in_them(folder, processor, make_processor):
    dataset, everything = Dataset([folder]), np.arange(97)
    table = TokenCounts(dataset, processor)(everything)
    files = sorted(folder.glob("*.tokens.npy"))
    short = make_processor(DataConfig(seq_length=28, answer_loss_only=True, on_too_long="drop"))
    limited = TokenCounts(dataset, short, max_patches=16)
    assert sorted(folder.glob("*.tokens.npy")) == files
    reasons = np.array([Reason.numbered(number).text for number in limited(everything)["reason"].tolist()])
    assert (
        reasons == np.where(table["patches"] > 16, "too_many_patches", np.where(table["tokens"] > 28, "too_long", ""))
    ).all()
    assert len(set(reasons)) == 3 and (limited.shard(1)["reason"] == limited(everything)["reason"][20:40]).all()


def test_damaged_counts_are_made_again(folder, processor):
    dataset = Dataset([folder])
    good = TokenCounts(dataset, processor)(np.arange(97))
    path = sorted(folder.glob("*.tokens.npy"))[1]
    for content in (b"", b"rubbish", path.read_bytes()[:200]):
        path.write_bytes(content)
        assert (TokenCounts(dataset, processor)(np.arange(97)) == good).all()


def test_a_folder_that_cannot_be_written_uses_the_cache(folder, processor, tmp_path):
    dataset = Dataset([folder])
    name = f"shard-000002.{replace(processor, seq_length=NO_LIMIT).fingerprint[:16]}.tokens.npy"
    (folder / name).mkdir()  # the tests may run as root, whom no permission stops
    table = TokenCounts(dataset, processor, cache_dir=tmp_path / "cache")(np.arange(97))
    assert len(table) == 97
    assert [p.name for p in (tmp_path / "cache").rglob("*.npy")] == [name]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"set data\.cache_dir"):
        TokenCounts(dataset, processor, cache_dir=tmp_path / "file" / "x")
    assert not list(folder.glob(".*"))  # no temporary file stays


def test_a_full_disk_is_told_of(folder, processor, tmp_path):
    """Of counts, which would then go to the cache, and of the list of what is excluded; nothing half written stays."""
    dataset = Dataset([folder])
    config = DataConfig(seq_length=28, on_too_long="drop")
    short = TokenCounts(dataset, replace(processor, seq_length=28))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"cannot write .*excluded.jsonl: File too large: make room"):
            survey(short, config, tmp_path / "out")
        for path in folder.glob("*.tokens.npy"):
            path.unlink()
        with pytest.raises(
            ConfigError, match=r"tokens.npy: File too large; .*tokens.npy: File too large.*data\.cache_dir"
        ):
            TokenCounts(dataset, processor, cache_dir=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = [path for place in (folder, tmp_path / "cache", tmp_path / "out") for path in place.rglob(".*")]
    assert not left and not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_processes_count_alike(folder, processor, monkeypatch):
    dataset = Dataset([folder])
    alone = TokenCounts(dataset, processor)(np.arange(97))
    for path in folder.glob("*.tokens.npy"):
        path.unlink()
    monkeypatch.setattr(counts, "MANY", 50)
    assert (TokenCounts(dataset, processor, num_workers=1)(np.arange(97)) == alone).all()
    assert len(list(folder.glob("*.tokens.npy"))) == 5


def test_several_at_once_agree(folder, make_processor):
    """Four readers, each starting with another shard, as data parallel ranks do."""
    processors = [make_processor(DataConfig(seq_length=512)) for _ in range(4)]

    def work(rank):
        return TokenCounts(Dataset([folder]), processors[rank], rank=rank, num_ranks=4)(np.arange(97))

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(work, range(4))
    assert all((other == first).all() for other in others)
    assert len(list(folder.glob("*.tokens.npy"))) == 5 and not list(folder.glob(".*"))


def test_the_share_of_samples_that_cannot_be_used_is_bounded():
    """Those that a limit of the run leaves out do not count."""
    config = DataConfig(seq_length=8, max_bad_fraction=0.1)
    check_share({"samples": 20, "excluded": {"too_long": 9, "max_image_num": 5, "placeholders": 2}}, config)
    with pytest.raises(
        DataError, match=r"3 of 20 samples .*1 placeholders, 2 nothing_supervised.*15.0%.*allows 10.0%.*in /x"
    ):
        check_share({"samples": 20, "excluded": {"placeholders": 1, "nothing_supervised": 2}}, config, Path("/x"))
