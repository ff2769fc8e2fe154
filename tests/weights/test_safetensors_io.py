"""Our reader and writer against the safetensors library, damaged files, and directories that appear at once or not at all."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.errors import ConversionError
from megatron_vlm.files import file_digest
from megatron_vlm.weights.mapping import TensorInfo
from megatron_vlm.weights.safetensors_io import (
    SafetensorsFile,
    SafetensorsWriter,
    aligned_order,
    atomic_directory,
)

TENSORS = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "half": torch.randn(5, 3).bfloat16(),
    "fp16": torch.randn(7).half(),
    "wide": torch.randn(2, 3, dtype=torch.float64),
    "plain": torch.randn(4, 6),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False]),
    "ids": torch.arange(9).reshape(3, 3),
}


def write(path, tensors, metadata=None):
    infos = aligned_order({name: TensorInfo.of(tensor) for name, tensor in tensors.items()})
    writer = SafetensorsWriter(path, infos, metadata)
    for name in infos:
        writer.write(name, tensors[name])
    return writer.close()


def test_the_library_reads_what_we_write(tmp_path):
    digest = write(tmp_path / "a.safetensors", TENSORS, {"format": "pt"})
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(loaded[n].dtype == t.dtype and torch.equal(loaded[n], t) for n, t in TENSORS.items())
    data = (tmp_path / "a.safetensors").read_bytes()
    assert digest == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert file_digest(tmp_path / "a.safetensors") == digest


def test_pieces_are_joined(tmp_path):
    full = torch.randn(7, 3)
    writer = SafetensorsWriter(tmp_path / "a.safetensors", {"a": TensorInfo.of(full)})
    writer.write("a", full[:2], full[2:2], full[2:])
    writer.close()
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], full)


def test_we_read_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors", {"key": "value"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.metadata == {"key": "value"}
    assert file.infos == {name: TensorInfo.of(TENSORS[name]) for name in file.infos} and len(file.infos) == len(TENSORS)
    assert all(torch.equal(file.read(name), tensor) for name, tensor in TENSORS.items())
    file.close()


@pytest.mark.parametrize("order", ["file", "reversed", "none"])
def test_digest_does_not_depend_on_what_was_read(tmp_path, order):
    digest = write(tmp_path / "a.safetensors", TENSORS)
    file = SafetensorsFile(tmp_path / "a.safetensors")
    names = {"file": list(file.infos), "reversed": list(file.infos)[::-1], "none": []}[order]
    for name in names:
        file.read(name)
    assert file.sha256() == digest["sha256"]
    file.close()


def test_writer_refuses_what_was_not_announced(tmp_path):
    infos = {"a": TensorInfo.of(torch.zeros(2)), "b": TensorInfo.of(torch.zeros(3))}
    writer = SafetensorsWriter(tmp_path / "x.safetensors", infos)
    with pytest.raises(ConversionError, match="got tensor b where a comes next"):
        writer.write("b", torch.zeros(3))
    writer = SafetensorsWriter(tmp_path / "y.safetensors", infos)
    with pytest.raises(ConversionError, match="header"):
        writer.write("a", torch.zeros(4))
    writer = SafetensorsWriter(tmp_path / "z.safetensors", infos)
    writer.write("a", torch.zeros(2))
    with pytest.raises(ConversionError, match="1 announced tensors were not written: b"):
        writer.close()
    with pytest.raises(ConversionError, match="unaligned"):
        SafetensorsWriter(tmp_path / "u", {"a": TensorInfo.of(TENSORS["odd"]), "b": TensorInfo.of(torch.zeros(1))})


@pytest.mark.parametrize("damage", ["header", "data", "garbage", "empty", "absent", "directory"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "weights.safetensors"
    write(path, TENSORS)
    data = path.read_bytes()
    if damage in ("absent", "directory"):
        path.unlink()
        if damage == "directory":
            path.mkdir()
    else:
        path.write_bytes({"header": data[:40], "data": data[:-1], "garbage": b"x" * 400, "empty": b""}[damage])
    with pytest.raises(ConversionError, match=r"weights\.safetensors"):
        SafetensorsFile(path)


def test_a_file_cut_while_it_is_open_is_an_error(tmp_path):
    path = tmp_path / "weights.safetensors"
    write(path, {"a": torch.randn(100_000), "b": torch.randn(100_000)})
    file = SafetensorsFile(path)
    with open(path, "r+b") as raw:
        raw.truncate(500_000)
    assert len(file.read("a")) == 100_000
    with pytest.raises(ConversionError, match=r"reading b from .* the file was cut"):
        file.read("b")
    file.close()


def test_an_unknown_dtype_is_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(ConversionError, match="F4"):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_directory_appears_whole(tmp_path):
    out = tmp_path / "new" / "out"
    with atomic_directory(out) as temporary:
        (temporary / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_directory_does_not_appear_after_an_error(tmp_path):
    with pytest.raises(KeyError), atomic_directory(tmp_path / "out") as temporary:
        (temporary / "file").write_text("x")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out") as temporary:  # empty: fine
        (temporary / "file").write_text("x")
    with pytest.raises(ConversionError, match="not empty"), atomic_directory(tmp_path / "out"):
        pass
    with pytest.raises(ConversionError, match="not a directory"), atomic_directory(tmp_path / "out" / "file"):
        pass
    with pytest.raises(ConversionError, match="GB free, the output needs"), atomic_directory(tmp_path / "big", 10**18):
        pass
