"""A step of a pipeline on a simulated clock: what each pass takes is told, who waits for whom is 1F1B's.

    seconds of every pass on every rank --> seconds of the step

Source of the order: megatron-core 0.16.1, pipeline_parallel/schedules.py, forward_backward_pipelining_without_interleaving.
"""

from collections.abc import Sequence


def step_seconds(forward: Sequence[Sequence[float]], backward: Sequence[Sequence[float]]) -> float:
    """Seconds of a step.

    Args:
        forward, backward: [ranks][microbatches], seconds of each pass.
    """
    pp, microbatches = len(forward), len(forward[0])
    done: dict[tuple[bool, int, int], float] = {}
    clock, orders = [0.0] * pp, []
    for rank in range(pp):
        warm = min(pp - rank - 1, microbatches)
        order = [(True, i) for i in range(warm)]
        order += [item for i in range(microbatches - warm) for item in ((True, warm + i), (False, i))]
        orders.append(order + [(False, i) for i in range(microbatches - warm, microbatches)])
    while any(orders):
        for rank in range(pp):
            while orders[rank]:
                ahead, i = orders[rank][0]
                other = rank - 1 if ahead else rank + 1
                if 0 <= other < pp and (ahead, i, other) not in done:
                    break
                start = max(clock[rank], done.get((ahead, i, other), 0.0))
                clock[rank] = done[ahead, i, rank] = start + (forward if ahead else backward)[rank][i]
                orders[rank].pop(0)
    return max(clock)


def step_work(loads: Sequence[float], microbatches: int) -> float:
    """Work of a step in the time of one rank, of ranks whose microbatches are all alike: a third of each is its forward pass."""
    played = min(microbatches, 4 * len(loads))  # from then on every further one takes what the slowest rank does
    passes = ([[share * load] * played for load in loads] for share in (1 / 3, 2 / 3))
    return step_seconds(*passes) + (microbatches - played) * max(loads)
