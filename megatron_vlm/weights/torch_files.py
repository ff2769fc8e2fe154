"""Weights saved by ``torch.save`` (``pytorch_model.bin``, ``.pth``): read without running anything they hold.

torch's weights-only reader builds tensors and plain containers and refuses every other class by name. Files of torch 1.6 and
later are mapped, so that only the tensors that are read take memory.
"""

import os
import re
from _pickle import UnpicklingError  # the exception alone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.errors import ConversionError
from megatron_vlm.files import describe, open_regular, refuse_lfs_pointer
from megatron_vlm.log import get_logger
from megatron_vlm.weights.mapping import TensorInfo

_CLASS = re.compile(r"(?:GLOBAL|class) ([\w.]+)")
_NO_MAP = "mmap can only be used"


class TorchFile:
    """One ``.bin`` file: a flat dictionary of tensors.

    Attributes:
        infos: name -> TensorInfo, in the order of the file.

    Raises:
        ConversionError: absent, damaged, holding other classes than tensors, or not a flat dictionary of tensors.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._tensors: dict[str, Tensor] = load_weights_only(self.path)
        others = {name: type(value).__name__ for name, value in self._tensors.items() if not isinstance(value, Tensor)}
        if others:
            name, kind = next(iter(others.items()))
            raise ConversionError(
                f"{self.path} is no plain dictionary of tensors: {name!r} is of type {kind} ({len(others)} such entries); "
                "save the model's state_dict alone"
            )
        self.infos = {name: TensorInfo.of(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """Returns one tensor, a view of the file where its layout allows."""
        return self._tensors[name].detach().contiguous()

    def close(self) -> None:
        """Lets go of the file; tensors that were read stay valid."""
        self._tensors = {}


def load_weights_only(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a dictionary of tensors and plain values.

    Raises:
        ConversionError: absent, damaged, or holding a class that is not built from tensors and plain values, which is
            named and never run.
    """
    path = Path(path)
    if not path.exists():
        raise ConversionError(f"weights file {describe(path)} does not exist")
    with open_regular(path, ConversionError) as file:
        refuse_lfs_pointer(path, file.read(64), ConversionError)
    # Libraries declare classes of theirs safe for the whole process (megatron-core does): here none is.
    declared = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if _NO_MAP not in str(error):
                raise
            get_logger(__name__).info("%s is in the format of torch before 1.6: it is read whole", path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        named = _CLASS.search(str(error))
        if named is None:
            raise ConversionError(
                f"weights file {path} cannot be read: it is damaged, or no file that torch.save wrote"
            ) from error
        raise ConversionError(
            f"{path} holds objects of class {named[1]}, which could run code: it is refused. Where you trust the file, strip "
            "it once: load it with weights_only=False in an environment of its own, and save its state_dict alone"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConversionError(f"weights file {path} is truncated or damaged, fetch it again ({reason})") from error
    finally:
        torch.serialization.add_safe_globals(declared)
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a dictionary of tensors, found {type(content).__name__}")
    return content
