"""HF directories: shards and index, damaged ones, hub ids in an offline cache, the files that travel along."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.weights.hf_io import (
    HFTensors,
    HFWriter,
    parse_size,
    plan_shards,
    resolve_directory,
)
from megatron_vlm.weights.mapping import TensorInfo
from megatron_vlm.weights.model_folder import copy_hf_files

ROOT = Path(__file__).parents[2]
TENSORS = {f"layer.{i}": torch.randn(10, 10) for i in range(5)}
INDEX = "model.safetensors.index.json"


def write(directory, max_shard_size="1kB", tensors=TENSORS):
    directory.mkdir(parents=True, exist_ok=True)
    with HFWriter(directory, {n: TensorInfo.of(t) for n, t in tensors.items()}, max_shard_size) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.close()


@pytest.mark.parametrize("size, files", [("1GB", 1), ("1kB", 3), ("1B", 5), (400, 5)])
def test_written_shards_are_read_by_the_library_and_by_us(tmp_path, size, files):
    write(tmp_path, size)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == files and (tmp_path / INDEX).exists() == (files > 1)
    loaded = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    tensors = HFTensors(tmp_path)
    assert loaded.keys() == TENSORS.keys() == tensors.infos.keys()
    assert all(torch.equal(loaded[n], t) and torch.equal(tensors.read(n), t) for n, t in TENSORS.items())
    if files > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"] == {"total_parameters": 500, "total_size": 2000}
        assert shards[0].name == f"model-00001-of-{files:05d}.safetensors"
        assert {n: (tmp_path / s) for n, s in index["weight_map"].items()}.keys() == TENSORS.keys()


def test_shards_are_dealt_as_transformers_deals_them():
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = {f"t{i}": torch.zeros(n) for i, n in enumerate([10, 60, 3, 40, 40, 90, 1, 1])}
    expected = split_torch_state_dict_into_shards(tensors, max_shard_size=400)
    plan = plan_shards({name: TensorInfo.of(tensor) for name, tensor in tensors.items()}, 400)
    assert sorted(list(names) for names in plan.values()) == sorted(expected.filename_to_tensors.values())


def test_symlinked_files_are_followed(tmp_path):
    write(tmp_path / "blobs")
    (tmp_path / "blobs" / "config.json").write_text("{}")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert HFTensors(tmp_path / "snapshot").infos.keys() == TENSORS.keys()
    copy_hf_files(tmp_path / "snapshot", tmp_path / "copy")
    assert not (tmp_path / "copy" / "config.json").is_symlink()


def absent_shard(directory):
    (directory / "model-00002-of-00003.safetensors").unlink()
    return "model-00002-of-00003.safetensors"


def dangling_link(directory):
    absent_shard(directory)
    (directory / "model-00002-of-00003.safetensors").symlink_to(directory / "gone")
    return "model-00002-of-00003.safetensors"


def truncated_shard(directory):
    path = directory / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    return "model-00003-of-00003.safetensors"


def edit_index(directory, change):
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def tensor_absent(directory):
    edit_index(directory, lambda weight_map: weight_map.update({"layer.9": "model-00001-of-00003.safetensors"}))
    return r"layer\.9 \(model-00001-of-00003"


def tensor_unlisted(directory):
    edit_index(directory, lambda weight_map: weight_map.pop("layer.3"))
    return r"not in .*: layer\.3"


def tensor_twice(directory):
    save_file({"layer.0": torch.zeros(1), "layer.4": torch.zeros(1)}, directory / "model-00003-of-00003.safetensors")
    return r"layer\.0 is both in model-00001.* and model-00003"


def broken_index(directory):
    (directory / INDEX).write_text("{")
    return "not valid JSON"


def empty_index(directory):
    (directory / INDEX).write_text("{}")
    return "no weight_map"


def no_weights(directory):
    for path in directory.iterdir():
        path.unlink()
    return "none of model.safetensors, .* and pytorch_model.bin.index.json$"


def other_format_only(directory):
    no_weights(directory)
    (directory / "model.gguf").write_bytes(b"x")
    return "none of model.safetensors, .*; it has model.gguf: no weights of other names"


@pytest.mark.parametrize(
    "damage",
    [
        absent_shard, dangling_link, truncated_shard, tensor_absent, tensor_unlisted, tensor_twice, broken_index,
        empty_index, no_weights, other_format_only,
    ],
)  # fmt: skip
def test_damaged_directories_are_named(tmp_path, damage):
    write(tmp_path / "model")
    with pytest.raises(ConversionError, match=damage(tmp_path / "model")):
        HFTensors(tmp_path / "model")


def test_every_file_but_weights_is_copied(tmp_path):
    source = tmp_path / "source"
    kept = ["config.json", "tokenizer.model", "README.md", "chat_template.jinja", "assets/logo.png"]
    left = [
        "model.safetensors", "a.safetensors.index.json", "pytorch_model.bin", "x.gguf", ".git/config", "onnx/m.onnx",
        "weights/adapter.safetensors",
    ]  # fmt: skip
    for name in kept + left:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    copy_hf_files(source, tmp_path / "copy")
    found = sorted(str(p.relative_to(tmp_path / "copy")) for p in (tmp_path / "copy").rglob("*") if not p.is_dir())
    assert found == sorted(kept)


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("1.5MiB", 3 << 19), ("70", 70), (70, 70), ("2kB", 2000)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5 apples", "-1GB", "0"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(text)


def hub_cache(cache, model_id, commit="0123456789abcdef0123456789abcdef01234567"):
    """A cache as huggingface_hub lays it out: blobs, and a snapshot of links to them."""
    root = cache / f"models--{model_id.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    write(root / "blobs")
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    for path in (root / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    return snapshot


RESOLVE = """
import sys
from megatron_vlm.weights.hf_io import HFTensors, resolve_directory
from megatron_vlm.weights.model_folder import copy_hf_files
from megatron_vlm.errors import ConversionError
for model_id in sys.argv[1:]:
    try:
        print(len(HFTensors(resolve_directory(model_id)).infos))
    except ConversionError as error:
        print(error)
"""


def test_hub_ids_are_read_from_the_cache(tmp_path):
    hub_cache(tmp_path, "someone/tiny-model")
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RESOLVE, "someone/tiny-model", "someone/else"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    found, message = result.stdout.strip().splitlines()
    assert found == "5"
    assert "neither a directory" in message and "HF_HUB_OFFLINE is set" in message and str(tmp_path) in message


@pytest.mark.parametrize("path", ["/no/such/directory", "no-such-directory", "./a/b/c", "a b/c"])
def test_what_is_neither_directory_nor_hub_id_is_refused(path):
    with pytest.raises(ConversionError, match="does not exist"):
        resolve_directory(path)


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConversionError, match="is a file"):
        resolve_directory(tmp_path / "file")
