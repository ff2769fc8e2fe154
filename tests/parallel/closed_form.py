"""The least time of a 1F1B step in closed form, for stages of any loads whose microbatches are all alike."""

from collections.abc import Sequence


def through(stage: int, pp: int, load: float, before: float, after: float, microbatches: int) -> float:
    """No step is shorter than this path through one stage; a third of a load is its forward pass.

    The first row comes through the stages before, whose loads add up to ``before``, and the last one goes back through them. From
    a row's forward to its backward pass the stages behind take ``after``: in that time, at the first row and at the last, the
    stage itself has only ``behind`` more passes of one kind to do. All its other passes follow one another.
    """
    behind = pp - 1 - stage
    first, last = (max(behind * share * load, after) for share in (1 / 3, 2 / 3))
    return before + first + (microbatches - behind) * load + last


def closed_form(loads: Sequence[float], microbatches: int) -> float:
    """The longest path through one stage; even stages: microbatches + ranks - 1 times a load."""
    return max(
        through(stage, len(loads), load, sum(loads[:stage]), sum(loads[stage + 1 :]), microbatches)
        for stage, load in enumerate(loads)
    )
