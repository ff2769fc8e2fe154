"""Which base an adapter belongs to: what a checkpoint records of it, and how it is known again.

The record holds what survives a change of format or dtype: names and shapes of all tensors, hashed, and a few values of the
weights, compared to within the rounding of 16-bit floats.
"""

import hashlib
import json
from collections.abc import Callable
from collections.abc import Mapping as Dict
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_vlm.errors import CheckpointError
from megatron_vlm.sources.source import WeightSource
from megatron_vlm.weights.mapping import TensorInfo

_VALUES = 64
_MARKED = 64
"""Values of each of three weights by which a base is known."""
_SAME = 2.0**-7
"""Relative distance of a weight from its copy in bf16 or fp16."""


def describe_base(source: WeightSource, path: str) -> dict[str, Any]:
    """What state.json says of a base: ``path``, ``fingerprint`` of names and shapes, values of ``norms`` and of ``linears``.

    Args:
        source: of its weights.
        path: where it is, absolute, or a hub id.
    """
    return {
        "path": path,
        "family": source.spec.name,
        "fingerprint": _fingerprint(source),
        "norms": list(_norms(source)),
        "linears": None if source.quantization is not None else list(base_mark(source.infos, source.read)),
    }


def check_base(record: dict[str, Any], source: WeightSource, path: str) -> None:
    """Checks that a base is the one that ``record`` describes; values of linears only where both are in full.

    Raises:
        CheckpointError: it is another model, or other weights of the same one.
    """
    full = record["linears"] is not None and source.quantization is None
    if record["fingerprint"] != _fingerprint(source):
        problem = f"is another model (family {source.spec.name})"
    elif marks_apart(tuple(record["norms"]), _norms(source)) or (
        full and marks_apart(tuple(record["linears"]), base_mark(source.infos, source.read))
    ):
        problem = "holds other weights"
    else:
        problem = None
    if problem:
        raise CheckpointError(
            f"{path} {problem} than the base that the adapters were trained on ({record['family']} at {record['path']}): name "
            "that one with checkpoint.base (--base DIR)"
        )


def base_place(record: dict[str, Any], moved: str | None, what: Path) -> str:
    """Where the base of checkpoint ``what`` is now: at ``moved``, or where it was.

    Raises:
        CheckpointError: it is not there.
    """
    path = moved or record["path"]
    if Path(path).is_absolute() and not Path(path).exists():
        raise CheckpointError(
            f"{what} holds adapters alone, and their base is not at {path}: name its new place with checkpoint.base (--base DIR)"
        )
    return path


def base_mark(infos: Dict[str, TensorInfo], read: Callable[[str], Tensor]) -> tuple[float, ...]:
    """A few values of a model's weights, spread over it: the same in any layout, nearly so in any dtype.

    Args:
        infos, read: of the full tensors.
    """
    names = [name for name, info in infos.items() if len(info.shape) == 2 and ".decoder.layers." in name]
    values: list[float] = []
    for name in (names[0], names[len(names) // 2], names[-1]):
        flat = read(name).reshape(-1)
        values += flat[:: max(1, flat.numel() // _MARKED)][:_MARKED].double().tolist()
    return tuple(float(f"{value:.5g}") for value in values)


def marks_apart(left: tuple[float, ...], right: tuple[float, ...]) -> int:
    """How many values of two marks are those of different weights."""
    apart = sum(abs(a - b) > _SAME * max(abs(a), abs(b)) + 1e-7 for a, b in zip(left, right))
    return apart + abs(len(left) - len(right))


def _fingerprint(source: WeightSource) -> str:
    shapes = {name: list(info.shape) for name, info in source.infos.items()}
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()


def _norms(source: WeightSource) -> tuple[float, ...]:
    """The first values of one-dimensional tensors, which are never quantised."""
    names = sorted(name for name, info in source.infos.items() if len(info.shape) == 1)
    return tuple(float(f"{float(source.read(name)[0]):.5g}") for name in names[:: -(-len(names) // _VALUES)])
