"""Random numbers of a training step: seeds by (run seed, iteration, dp, tp, pp), so that no generator state is saved.

(seed, iteration, dp, pp, cp) --sha256--> default generator: equal on the tp ranks of a stage, different elsewhere
                                     +--> megatron-core's tracker, which adds the tp rank for split regions
(seed, iteration, dp, pp) ------------> the same two for what context parallel ranks compute alike, each for its own tokens
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

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

    place = (seed, iteration, topology.dp_rank, topology.pp_rank)
    value = derive_seed(*place, "context", topology.cp_rank) if topology.cp > 1 else derive_seed(*place)
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)
    tensor_parallel.model_parallel_cuda_manual_seed(
        value, tp_rank=topology.tp_rank, ep_rank=0, etp_rank=topology.tp_rank
    )
    if topology.cp > 1:
        tracker = tensor_parallel.get_cuda_rng_tracker()
        tracker.add(_ALIKE, derive_seed(*place))
        tracker.add(_ALIKE_SPLIT, derive_seed(*place, "split", topology.tp_rank))


_ALIKE, _ALIKE_SPLIT = "alike over context parallel ranks", "alike over context parallel ranks, split"


@contextmanager
def alike_over_context_ranks() -> Iterator[None]:
    """Runs a block that every context parallel rank runs on the same images: it draws the same numbers on all of them.

    Each rank needs features for its own tokens only, so that gradients of what made them are sums over these ranks; they must
    have left out the same. Nothing changes without context parallelism.
    """
    from megatron.core.tensor_parallel import random as mcore_random

    tracker = mcore_random.get_cuda_rng_tracker()
    if _ALIKE not in tracker.get_states():
        yield
        return
    split = mcore_random._MODEL_PARALLEL_RNG_TRACKER_NAME

    def exchange() -> None:
        states = tracker.get_states()
        tracker.set_states({**states, split: states[_ALIKE_SPLIT], _ALIKE_SPLIT: states[split]})

    exchange()
    try:
        with tracker.fork(_ALIKE):
            yield
    finally:
        exchange()


@contextmanager
def unchanged_generators() -> Iterator[None]:
    """Runs a block that may draw: torch's generators and megatron-core's tracker are as before after it.

    A layer of the block that is recomputed in the backward pass draws what it drew in the block.
    """
    from megatron.core.tensor_parallel import random as mcore_random

    states = mcore_random._get_all_rng_states()
    try:
        yield
    finally:
        mcore_random._set_all_rng_states(*states)
