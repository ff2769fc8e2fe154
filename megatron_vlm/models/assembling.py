"""What families share that make one model out of parts: tensors drawn by name, and vocabularies with new rows."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_vlm.files import read_bytes

_NOT_COPIED = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".md")


def generator(seed: int, name: str) -> torch.Generator:
    """A stream of its own for each tensor, so that the order of reading does not matter."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def extended_rows(
    read: Callable[[], Tensor],
    name: str,
    rows: int,
    new_ids: Sequence[int],
    new_rows: Literal["mean", "normal"],
    seed: int,
) -> Callable[[], Tensor]:
    """Reads a vocabulary tensor [V, H] with ``rows`` rows: those of ``new_ids`` and all beyond the old ones are new.

    Args:
        read: reads the old tensor.
        name: of the tensor, for its stream.
        rows: of the result.
        new_ids: ids of added tokens.
        new_rows: ``mean`` of the existing rows, or ``normal``: N(0, 0.02).
        seed: of what is drawn.
    """

    def read_extended() -> Tensor:
        old = read()
        first_new = min([*new_ids, old.shape[0]])
        fresh = sorted({*new_ids, *range(old.shape[0], rows)})
        full = torch.empty(rows, old.shape[1], dtype=old.dtype)
        full[: old.shape[0]] = old
        if new_rows == "mean":
            blocks = old[:first_new].split(8192)  # a float32 copy of the whole would be the largest tensor of all
            full[fresh] = (sum(block.double().sum(0) for block in blocks) / first_new).to(old.dtype)
        else:
            noise = torch.empty(len(fresh), old.shape[1]).normal_(0.0, 0.02, generator=generator(seed, name))
            full[fresh] = noise.to(old.dtype)
        return full

    return read_extended


def copy_small_files(source: Path, destination: Path) -> None:
    """Copies the files of a folder that hold neither weights nor its model card; its folders stay behind."""
    destination.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_NOT_COPIED):
            (destination / path.name).write_bytes(read_bytes(path))


def copy_licences(source: Path, destination: Path) -> None:
    """Copies licence and notice files."""
    for path in source.iterdir():
        if path.is_file() and path.name.upper().startswith(("LICENSE", "NOTICE", "USE_POLICY")):
            (destination / path.name).write_bytes(read_bytes(path))
