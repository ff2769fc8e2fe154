"""What saving and loading share: work that fails on all ranks, and values of other ranks. Collectives of the whole job."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.errors import CheckpointError, MegatronVLMError
from megatron_vlm.parallel.batch import together


@contextlib.contextmanager
def checkpoint_work(what: str, device: torch.device) -> Iterator[None]:
    """Runs a block of local work; if it fails on any rank, every rank raises CheckpointError. A collective."""
    with together(device):
        try:
            yield
        except (MegatronVLMError, OSError) as error:
            raise CheckpointError(f"{what}: {error}") from error


def gather(value: Any) -> list[Any]:
    """One value of each rank, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
