"""Linears in 4 bits on disk: one file a stage, in which each HF tensor lies whole, so that any tp and pp read the same codes.

    nf4_PPP/model.safetensors    <HF name>.codes    uint8 [blocks, 32]
                                 <HF name>.scales   fp32 [groups]               with double quantisation
                                 <HF name>.offset   fp32 [1]                    likewise
                                 <HF name>.absmax   fp32 [blocks], or uint8 [blocks, rounded up to a multiple of 4]
    its metadata                 <HF name>: shape

The parts are those of ``peft.nf4.Nf4Tensor``; written in this order, every one of them starts aligned.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vlm.errors import ConversionError
from megatron_vlm.weights.mapping import Mapping, TensorInfo
from megatron_vlm.weights.nf4 import BLOCK, GROUP, Nf4Tensor, Quantization
from megatron_vlm.weights.safetensors_io import PARAMS_DTYPES, SafetensorsFile, SafetensorsWriter, Writers

if TYPE_CHECKING:
    from megatron_vlm.conversion.megatron_dir import Stages
    from megatron_vlm.conversion.source import WeightSource


def nf4_file(stage: int) -> str:
    """Path of one stage's file inside the directory."""
    return f"nf4_{stage:03d}/model.safetensors"


class Nf4Writer:
    """What ``write_megatron`` writes in 4 bits.

    Args:
        source: of the weights.
        mapping: of its family.
        stages: which stage stores which entry.
        quantize: as is wanted; None: as the source is stored.
        dtype: that the rest is written in; None: its own.

    Attributes:
        quantization: what is done; None: nothing.
        names: global names of the entries that are so written.
        nbytes: of all of them.

    Raises:
        ConfigError: the source is stored in 4 bits in another way.
    """

    def __init__(
        self,
        source: "WeightSource",
        mapping: Mapping,
        stages: "Stages",
        quantize: Quantization | None,
        dtype: torch.dtype | None,
    ):
        self.source, self.quantization = source, quantize or source.quantization
        self.names: set[str] = set()
        self.nbytes = 0
        self._plans: dict[int, dict[str, list[tuple[str, tuple[int, ...]]]]] = {}
        if self.quantization is None:
            return
        from megatron_vlm.peft.qlora import agree
        from megatron_vlm.peft.select import quantised_names

        names = [name for name, known in PARAMS_DTYPES.items() if known == dtype]
        agree(source, quantize, names[0] if names else self.quantization.dtype)
        self.names = quantised_names(mapping, source.infos, self.quantization.groups)
        if not self.names:
            raise ConversionError(f"the model has no linears in {', '.join(self.quantization.groups)} to quantise")
        for entry in mapping:
            if entry.name in self.names:
                shapes = [tuple(part.shape) for part in entry.from_full(source.infos[entry.name].meta())]
                self._plans.setdefault(stages.of(entry.name), {})[entry.name] = list(zip(entry.hf, shapes))
        self.nbytes = sum(
            info.nbytes for plan in self._plans.values() for info in self._infos(_tensors(plan.values())).values()
        )

    def write(self, directory: Path, writers: Writers) -> None:
        """Quantises and writes, one HF tensor at a time; on a GPU where there is one, as training would."""
        from megatron_vlm.peft.qlora import nf4_tensors
        from megatron_vlm.weights.nf4 import get_backend

        if self.quantization is None:
            return
        device = "cuda" if torch.cuda.is_available() else "cpu"
        backend = get_backend(device, self.quantization.backend)
        if self.source.quantization is None:
            self.quantization = self.quantization.replace(backend=backend.name)
        entries = self.source.mapping.by_name()
        for stage, plan in self._plans.items():
            path = directory / nf4_file(stage)
            path.parent.mkdir()
            tensors = _tensors(plan.values())
            metadata = {"format": "pt", **{hf: json.dumps(shape) for hf, shape in tensors}}
            writer = writers.open[nf4_file(stage)] = SafetensorsWriter(path, self._infos(tensors), metadata)
            for name in plan:
                parts = nf4_tensors(self.source, entries[name], self.quantization, backend, device)
                for (hf, _), tensor in zip(plan[name], parts, strict=True):
                    for part, values in _stored(tensor).items():
                        writer.write(f"{hf}.{part}", values.cpu())

    def _infos(self, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
        assert self.quantization is not None
        double = self.quantization.double_quant
        return {f"{hf}.{part}": info for hf, shape in tensors for part, info in _part_infos(shape, double).items()}


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
                for part, info in _part_infos(shape, quantization.double_quant).items()
            }
            if expected != file.infos:
                raise ConversionError(f"{file.path} does not hold the 4-bit parts that its header names: make it again")
            self.shapes |= shapes
            self._stage |= dict.fromkeys(shapes, stage)

    def read(self, hf_name: str) -> Nf4Tensor:
        """One HF tensor, views of the file."""
        file, shape = self.files[self._stage[hf_name]], self.shapes[hf_name]
        names = _part_infos(shape, self.quantization.double_quant)
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


def _tensors(plans: Iterable[list[tuple[str, tuple[int, ...]]]]) -> list[tuple[str, tuple[int, ...]]]:
    return [tensor for plan in plans for tensor in plan]


def _part_infos(shape: tuple[int, ...], double: bool) -> dict[str, TensorInfo]:
    blocks = -(-torch.Size(shape).numel() // BLOCK)
    infos = {"codes": TensorInfo(dtype=torch.uint8, shape=(blocks, BLOCK // 2))}
    if not double:
        return infos | {"absmax": TensorInfo(dtype=torch.float32, shape=(blocks,))}
    return infos | {
        "scales": TensorInfo(dtype=torch.float32, shape=(-(-blocks // GROUP),)),
        "offset": TensorInfo(dtype=torch.float32, shape=(1,)),
        "absmax": TensorInfo(dtype=torch.uint8, shape=(-(-blocks // 4) * 4,)),
    }


def _stored(tensor: Nf4Tensor) -> dict[str, Tensor]:
    """A tensor's parts as they are written."""
    if tensor.scales is None or tensor.offset is None:
        return {"codes": tensor.blocks(), "absmax": tensor.absmax}
    absmax = F.pad(tensor.absmax, (0, -tensor.num_blocks % 4))
    return {"codes": tensor.blocks(), "scales": tensor.scales, "offset": tensor.offset, "absmax": absmax}
