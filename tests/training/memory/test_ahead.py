"""Memory of images that are encoded ahead: against that of real steps."""

import pytest

from tests.training.memory.test_estimate import PP, TP, check, make_case

AHEAD = dict(vision_parallel="ahead")
CASES = [make_case("idefics2", "images ahead", parallel=TP | AHEAD, alone=True)]
MORE = [
    make_case("idefics2", "frozen tower", parallel=TP | AHEAD, model=dict(freeze_vision=True), alone=True),
    make_case("idefics2", "recompute", parallel=TP | AHEAD | dict(recompute_granularity="full"), alone=True),
    make_case("idefics2", "on the host", parallel=TP | AHEAD | dict(offload_activations=True), alone=True),
    make_case("internvl3", "pp 2", parallel=PP | AHEAD),
    make_case("idefics2", "images shared", parallel=TP | dict(vision_parallel="share"), alone=True),
]


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.full) for case in MORE)], ids=lambda case: case.name
)
def test_as_measured(case):
    """Worst case seen: 0.2 % below; with stages 5 %, as gloo frees a broadcast's buffer where it is not seen."""
    check(case, 0.1 if case.name == "pp 2" else 0.04)
