"""Linears in 4 bits on disk: one file a stage, in which each HF tensor lies whole, so that any tp and pp read the same codes.

    nf4_PPP/model.safetensors    <HF name>.codes    uint8 [blocks, 32]
                                 <HF name>.scales   fp32 [groups]               with double quantisation
                                 <HF name>.offset   fp32 [1]                    likewise
                                 <HF name>.absmax   fp32 [blocks], or uint8 [blocks, rounded up to a multiple of 4]
    its metadata                 <HF name>: shape

The parts are those of ``nf4.Nf4Tensor``; written in this order, every one of them starts aligned.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vlm.errors import ConversionError
from megatron_vlm.weights.mapping import TensorInfo
from megatron_vlm.weights.nf4.tensor import BLOCK, GROUP, Nf4Tensor, Quantization
from megatron_vlm.weights.safetensors_io import PARAMS_DTYPES, SafetensorsFile


def nf4_file(stage: int) -> str:
    """Path of one stage's file inside the directory."""
    return f"nf4_{stage:03d}/model.safetensors"


class Nf4Reader:
    """The 4-bit weights of a directory, all stages' files opened.

    Args:
        directory: Megatron weights.
        num_stages: of them.
        quantization: as the manifest says.

    Attributes:
        files: stage -> file.
        shapes: HF name -> shape of the tensor.

    Raises:
        ConversionError: a file that does not hold what its header says.
    """

    def __init__(self, directory: Path, num_stages: int, quantization: Quantization):
        self.quantization = quantization
        self.files: dict[int, SafetensorsFile] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stage: dict[str, int] = {}
        for stage in range(num_stages):
            if not (directory / nf4_file(stage)).exists():
                continue  # nothing of it is quantised; a file that the manifest lists was missed before
            file = self.files[stage] = SafetensorsFile(directory / nf4_file(stage))
            shapes = {hf: tuple(json.loads(shape)) for hf, shape in file.metadata.items() if hf != "format"}
            expected = {
                f"{hf}.{part}": info
                for hf, shape in shapes.items()
                for part, info in part_infos(shape, quantization.double_quant).items()
            }
            if expected != file.infos:
                raise ConversionError(f"{file.path} does not hold the 4-bit parts that its header names: make it again")
            self.shapes |= shapes
            self._stage |= dict.fromkeys(shapes, stage)

    def read(self, hf_name: str) -> Nf4Tensor:
        """One HF tensor, views of the file."""
        file, shape = self.files[self._stage[hf_name]], self.shapes[hf_name]
        names = part_infos(shape, self.quantization.double_quant)
        parts = {part: file.read(f"{hf_name}.{part}") for part in names}
        parts["absmax"] = parts["absmax"][: len(parts["codes"])]
        return Nf4Tensor(shape=shape, **{**parts, "codes": parts["codes"].view(-1)})

    def info(self, hf_name: str) -> TensorInfo:
        """Shape, and the dtype that it stands for."""
        return TensorInfo(dtype=PARAMS_DTYPES[self.quantization.dtype], shape=self.shapes[hf_name])

    def close(self) -> None:
        """Closes the files."""
        for file in self.files.values():
            file.close()


def part_infos(shape: tuple[int, ...], double: bool) -> dict[str, TensorInfo]:
    """Name -> dtype and shape of the parts of one HF tensor, in their order; ``double``: its scales are in 8 bits."""
    blocks = -(-torch.Size(shape).numel() // BLOCK)
    infos = {"codes": TensorInfo(dtype=torch.uint8, shape=(blocks, BLOCK // 2))}
    if not double:
        return infos | {"absmax": TensorInfo(dtype=torch.float32, shape=(blocks,))}
    return infos | {
        "scales": TensorInfo(dtype=torch.float32, shape=(-(-blocks // GROUP),)),
        "offset": TensorInfo(dtype=torch.float32, shape=(1,)),
        "absmax": TensorInfo(dtype=torch.uint8, shape=(-(-blocks // 4) * 4,)),
    }


def stored_parts(tensor: Nf4Tensor) -> dict[str, Tensor]:
    """A tensor's parts as they are written."""
    if tensor.scales is None or tensor.offset is None:
        return {"codes": tensor.blocks(), "absmax": tensor.absmax}
    absmax = F.pad(tensor.absmax, (0, -tensor.num_blocks % 4))
    return {"codes": tensor.blocks(), "scales": tensor.scales, "offset": tensor.offset, "absmax": absmax}
