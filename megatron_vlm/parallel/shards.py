"""What this rank holds of a parameter that torch's ``fully_shard`` cut over ranks: a stretch of the flat tensor.

    parameter [R, ...] over n ranks --> rank i has rows [i * ceil(R / n), (i + 1) * ceil(R / n)): flat [start, start + numel)

Few rows over many ranks leave the last ones fewer, or none. A parameter that is not cut is held whole, from 0 on.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def held(parameter: Tensor) -> tuple[Tensor, int]:
    """(this rank's rows, number of their first element in the flat parameter); the rows share memory with the parameter."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    mesh = parameter.device_mesh
    place = mesh.get_coordinate()
    assert place is not None
    rows = len(parameter)
    first = min(rows, place[-1] * -(-rows // mesh.size(mesh.ndim - 1)))
    return parameter.to_local().detach(), first * parameter.shape[1:].numel()


def replica(parameter: Tensor) -> tuple[int, int] | None:
    """(number of this rank's sharding group, number of such groups, which hold the same); None: the parameter is not cut."""
    if not isinstance(parameter, DTensor):
        return None
    mesh, place = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    assert place is not None
    return (place[0], mesh.size(0)) if mesh.ndim > 1 else (0, 1)


def put(parameter: Tensor, whole: Tensor) -> None:
    """Copies what this rank holds out of ``whole``, the values of all of the parameter."""
    mine, start = held(parameter)
    with torch.no_grad():
        mine.copy_(whole.reshape(-1)[start : start + mine.numel()].view_as(mine))
