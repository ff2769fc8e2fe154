"""Megatron weights as sources: shards as they lie, merged or cut anew; damaged folders are named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.errors import ConversionError
from megatron_vlm.sources.megatron import MegatronSource


def test_shards_are_read_directly_or_merged(twins, tmp_path):
    hf2mg(twins("mistral"), tmp_path / "mg", tp=2, vocab_multiple=8)
    with open_source(twins("mistral")) as hf, open_source(tmp_path / "mg") as megatron:
        assert list(hf.infos) == list(megatron.infos) and megatron.kind == "megatron"
        for tp, multiple in ((2, 8), (2, 1), (4, 8), (1, 8)):
            for entry in hf.spec.mapping(hf.config, tp=tp).padded(multiple):
                for rank in range(tp):
                    shard = megatron.read_shard(entry.name, entry.split, tp, rank)
                    assert torch.equal(shard, hf.read_shard(entry.name, entry.split, tp, rank)), entry.name
                assert (
                    megatron.infos[entry.name].shape == hf.infos[entry.name].shape == tuple(hf.read(entry.name).shape)
                )


def test_damaged_megatron_weights_are_named(twins, tmp_path):
    good = tmp_path / "good"
    hf2mg(twins("mistral"), good, tp=2)
    file = "mp_rank_01_000/model.safetensors"

    def damaged(name):
        return Path(shutil.copytree(good, tmp_path / name))

    bad = damaged("truncated")
    (bad / file).write_bytes((good / file).read_bytes()[:-1])
    with pytest.raises(ConversionError, match=r"mp_rank_01_000/model\.safetensors has .* truncated"):
        open_source(bad)
    bad = damaged("absent")
    shutil.rmtree(bad / "mp_rank_01_000")
    with pytest.raises(ConversionError, match=r"mp_rank_01_000/model\.safetensors is missing"):
        open_source(bad)
    bad = damaged("flipped")
    data = bytearray((good / file).read_bytes())
    data[-5] ^= 1
    (bad / file).write_bytes(data)
    with pytest.raises(ConversionError, match=r"changed: its sha256|replicated tensor differs"):
        mg2hf(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    bad = damaged("other_version")
    (bad / "megatron.json").write_text(json.dumps(json.loads((good / "megatron.json").read_text()) | {"version": 9}))
    with pytest.raises(ConversionError, match="version 9"):
        open_source(bad)
    bad = damaged("replica")
    shard = load_file(bad / file)
    shard["connector.perceiver_resampler.latents"] += 1
    save_file(shard, bad / file)
    manifest = json.loads((bad / "megatron.json").read_text())
    manifest["files"][file]["size"] = (bad / file).stat().st_size
    (bad / "megatron.json").write_text(json.dumps(manifest))
    with MegatronSource(bad) as source, pytest.raises(ConversionError, match="latents: replicated tensor differs"):
        source.read("connector.perceiver_resampler.latents")
