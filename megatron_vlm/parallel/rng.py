"""Random numbers of a training step: seeds by (run seed, iteration, dp, tp, pp), so that no generator state is saved.

(seed, iteration, dp, pp) --sha256--> default generator: equal on the tp ranks of a stage, different elsewhere
                                 +--> megatron-core's tracker, which adds the tp rank for split regions
"""

import hashlib
import random

import numpy
import torch

from megatron_vlm.parallel.topology import Topology


def derive_seed(*parts: int | str) -> int:
    """Mixes whole numbers and names into one seed below 2**31."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def seed_step(topology: Topology, seed: int, iteration: int) -> None:
    """Seeds every generator of this process for one iteration.

    A step draws the same numbers whether or not the run was interrupted before it.
    """
    from megatron.core import tensor_parallel

    value = derive_seed(seed, iteration, topology.dp_rank, topology.pp_rank)
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)
    tensor_parallel.model_parallel_cuda_manual_seed(
        value, tp_rank=topology.tp_rank, ep_rank=0, etp_rank=topology.tp_rank
    )
