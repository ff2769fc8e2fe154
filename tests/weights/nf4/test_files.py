"""Linears in 4 bits on disk: every part comes back as it was, and files that hold something else are refused."""

import json

import pytest
import torch

from megatron_vlm.errors import ConversionError
from megatron_vlm.weights.nf4.files import Nf4Reader, nf4_file, part_infos, stored_parts
from megatron_vlm.weights.nf4.tensor import Quantization, quantise
from megatron_vlm.weights.safetensors_io import SafetensorsWriter

SHAPES = {"a.weight": (64, 80), "b.weight": (7, 10), "c.weight": (300, 130)}


def write(directory, stage, tensors, shapes, double):
    infos = {f"{hf}.{p}": info for hf in tensors for p, info in part_infos(SHAPES[hf], double).items()}
    path = directory / nf4_file(stage)
    path.parent.mkdir()
    writer = SafetensorsWriter(path, infos, {"format": "pt", **{hf: json.dumps(shape) for hf, shape in shapes.items()}})
    for hf, tensor in tensors.items():
        for part, values in stored_parts(tensor).items():
            writer.write(f"{hf}.{part}", values)
    writer.close()


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_what_is_written_is_read(tmp_path, double):
    generator = torch.Generator().manual_seed(0)
    tensors = {hf: quantise(torch.randn(shape, generator=generator), double=double) for hf, shape in SHAPES.items()}
    write(tmp_path, 0, {"a.weight": tensors["a.weight"]}, {"a.weight": SHAPES["a.weight"]}, double)
    others = {hf: tensors[hf] for hf in ("b.weight", "c.weight")}  # stage 1 has no linears
    write(tmp_path, 2, others, {hf: SHAPES[hf] for hf in others}, double)
    reader = Nf4Reader(tmp_path, 3, Quantization(dtype="bf16", double_quant=double))
    assert reader.shapes == SHAPES and sorted(reader.files) == [0, 2]
    for hf, tensor in tensors.items():
        read = reader.read(hf)
        assert read.shape == tensor.shape and (reader.info(hf).dtype, reader.info(hf).shape) == (
            torch.bfloat16,
            SHAPES[hf],
        )
        assert torch.equal(read.blocks(), tensor.blocks())
        parts = tensor.parts()
        assert all(torch.equal(part, parts[name]) for name, part in read.parts().items() if name != "codes")
    reader.close()


def test_a_header_that_names_other_shapes(tmp_path):
    tensor = quantise(torch.ones(SHAPES["a.weight"]), double=True)
    write(tmp_path, 0, {"a.weight": tensor}, {"a.weight": (64, 160)}, True)
    with pytest.raises(ConversionError, match="does not hold the 4-bit parts that its header names"):
        Nf4Reader(tmp_path, 1, Quantization(dtype="bf16"))
