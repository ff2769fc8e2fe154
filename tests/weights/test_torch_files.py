"""Weights saved by torch: whole and in shards, mapped and in the old format; other classes are refused and never run."""

import argparse
import json

import pytest
import torch

from megatron_vlm.errors import ConversionError
from megatron_vlm.weights.hf_io import HFTensors
from megatron_vlm.weights.torch_files import TorchFile, load_weights_only

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3).T,  # not contiguous, as some checkpoints are
    "b": torch.arange(4, dtype=torch.bfloat16),
    "embeddings.position_ids": torch.arange(5),
}


@pytest.mark.parametrize("old_format", [False, True])
def test_tensors_are_read_as_they_were_saved(tmp_path, old_format):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old_format)
    tensors = HFTensors(tmp_path)
    assert list(tensors.infos) == list(TENSORS)
    for name, tensor in TENSORS.items():
        read = tensors.read(name)
        assert torch.equal(read, tensor) and read.is_contiguous() and read.dtype == tensor.dtype
        assert tensors.infos[name].shape == tuple(tensor.shape)
    tensors.close()


def write_shards(directory, **options):
    shards = {"pytorch_model-00001-of-00002.bin": ["a"], "pytorch_model-00002-of-00002.bin": ["b"]}
    for shard, names in shards.items():
        torch.save({name: TENSORS[name] for name in names}, directory / shard, **options)
    index = {"metadata": {}, "weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_shards_are_read_by_their_index(tmp_path):
    write_shards(tmp_path)
    tensors = HFTensors(tmp_path)
    assert set(tensors.infos) == {"a", "b"}
    assert torch.equal(tensors.read("a"), TENSORS["a"])
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ConversionError, match=r"names shard pytorch_model-00002-of-00002.bin"):
        HFTensors(tmp_path)


def test_safetensors_are_preferred(tmp_path):
    from safetensors.torch import save_file

    write_shards(tmp_path)
    save_file({"c": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert set(HFTensors(tmp_path).infos) == {"c"}


class Trap:
    """Running its reduction would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_other_classes_are_refused_by_name_and_not_run(tmp_path):
    torch.save({"a": torch.zeros(1), "args": argparse.Namespace(lr=1)}, tmp_path / "args.bin")
    with pytest.raises(ConversionError, match=r"objects of class argparse.Namespace.*state_dict alone"):
        load_weights_only(tmp_path / "args.bin")
    torch.save({"a": Trap(str(tmp_path / "sprung"))}, tmp_path / "trap.bin")
    with pytest.raises(ConversionError, match=r"trap.bin holds objects of class (io|_io).open"):
        TorchFile(tmp_path / "trap.bin")
    assert not (tmp_path / "sprung").exists()


def test_what_is_no_dictionary_of_tensors_is_named(tmp_path):
    torch.save({"state_dict": TENSORS}, tmp_path / "nested.bin")
    with pytest.raises(ConversionError, match="'state_dict' is of type dict"):
        TorchFile(tmp_path / "nested.bin")
    torch.save([1], tmp_path / "list.bin")
    with pytest.raises(ConversionError, match="must hold a dictionary of tensors, found list"):
        TorchFile(tmp_path / "list.bin")
    torch.save({"a": torch.zeros(100)}, tmp_path / "cut.bin")
    data = (tmp_path / "cut.bin").read_bytes()
    for content in (data[: len(data) // 2], b"x", b""):
        (tmp_path / "cut.bin").write_bytes(content)
        with pytest.raises(ConversionError, match=r"cut.bin"):
            TorchFile(tmp_path / "cut.bin")
    with pytest.raises(ConversionError, match="does not exist"):
        TorchFile(tmp_path / "absent.bin")
