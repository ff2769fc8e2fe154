"""A few samples stand for the data: the same as the whole index counts, in the shares of the mixture, limits laid on."""

import shutil

import numpy as np

from megatron_vlm.data.config import DataConfig, SourceConfig
from megatron_vlm.data.shards.dataset import Dataset
from megatron_vlm.data.stream import glance as module
from megatron_vlm.data.stream.counts import TokenCounts
from megatron_vlm.data.stream.glance import glance


def test_a_few_samples_are_counted_as_all_are(tmp_path, digits_dir, make_processor, monkeypatch):
    folder = tmp_path / "shards"
    shutil.copytree(digits_dir, folder, ignore=shutil.ignore_patterns("*.tokens.npy"))
    config = DataConfig(seq_length=256)
    processor = make_processor(config)
    seen = glance(config, processor, [folder], seed=1)
    assert not list(folder.glob("*.tokens.npy"))  # nothing was counted that need not be
    dataset = Dataset([folder])
    whole = TokenCounts(dataset, processor)(np.arange(len(dataset)))
    assert sorted(seen.tolist()) == sorted(whole.tolist())
    assert glance(config, processor, [folder], seed=1).tolist() == seen.tolist()
    few = SourceConfig(path=str(folder), per_epoch=7)
    assert len(glance(config, processor, [few], seed=1)) == 7
    limit = int(whole["tokens"].min())
    short = config.replace(seq_length=limit)
    some = glance(short, make_processor(short), [folder], seed=1)
    assert 0 < len(some) < len(whole) and some["tokens"].max() == limit  # samples that are too long are not trained on
    monkeypatch.setattr(module, "SAMPLES", 5)
    assert len(glance(config, processor, [folder], seed=1)) == 5
    assert glance(config, processor, [folder, tmp_path], seed=1) is None  # not built yet
