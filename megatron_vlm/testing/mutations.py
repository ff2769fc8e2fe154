"""Would a mistake show? The logits of a model with one deliberate mistake at a time, beside a parity test's bar.

names --on a rank: build, mutate(name, model, batch, patch), forward, undo--> logits --assert_noticed--> each far beyond the bar
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.data.row import Row
from megatron_vlm.testing.parity import build_for_test


def mutated_logits(
    mutate: Callable[[str, Any, Row, Callable[[Any, str, Any], None]], Row],
    directory: str,
    row: Row,
    names: Sequence[str],
) -> list[Tensor]:
    """On a rank: logits of the true model first, then of each mistake, each on a model of its own.

    Args:
        mutate: makes the mistake ``name`` (none for "none") and returns the batch to run; attributes of what outlives the
            model are set through ``patch(owner, attribute, value)``, which is undone.
        directory: of the twin.
        row: what is run.
        names: of the mistakes.
    """
    results = []
    for name in ("none", *names):
        _, _, (model,), _ = build_for_test(directory, {}, {})
        undo: list[tuple[Any, str, Any]] = []

        def patch(owner: Any, attribute: str, value: Any, undo: list[tuple[Any, str, Any]] = undo) -> None:
            undo.append((owner, attribute, getattr(owner, attribute)))
            setattr(owner, attribute, value)

        batch = mutate(name, model.eval(), row, patch)
        with torch.no_grad():
            results.append(model.logits(batch))
        for owner, attribute, value in undo:
            setattr(owner, attribute, value)
    return results


def assert_noticed(
    logits: Sequence[Tensor], expected: Tensor, names: Sequence[str], *, bar: float, times: float
) -> None:
    """Checks that the true model is within ``bar`` of the largest logit, and each mistake ``times`` beyond it; prints all.

    Raises:
        AssertionError: with the mistakes that would not show.
    """
    largest = float(expected.abs().max())
    found = {
        name: float((x - expected).abs().max()) / largest for name, x in zip(("none", *names), logits, strict=True)
    }
    print({name: f"{value:.1e}" for name, value in found.items()})
    true = found.pop("none")
    if true > bar:
        raise AssertionError(f"without a mistake the logits are off by {true:.1e} of the largest, the bar is {bar}")
    missed = {name: value for name, value in found.items() if value < times * bar}
    if missed:
        raise AssertionError(f"the bar of {bar} would not show these {times}-fold: {missed}")
