"""Every layout trains Qwen3-VL as one process does: levels go with the tokens, to the next stage too, or are refused by name."""

from dataclasses import replace
from functools import partial

import pytest

from megatron_vlm.testing.distributed import RankError
from megatron_vlm.testing.layouts import PAIRWISE_MORE, PAIRWISE_SMALL, Case, family_check, whole_matrix
from megatron_vlm.testing.twins.qwen2_5_vl import make_samples
from megatron_vlm.testing.twins.qwen3_vl import write_tiny_qwen3_vl

# Texts first, so that a rank without images meets one with; 0, 1 and 3 images.
ROWS = [[([], 23)], [([(3, 4)], 14), ([], 9)], [([(1, 2), (4, 3), (2, 2)], 7)], [([], 17)]]
# Of two levels, behind layers 0 and 1: at pp 4 these lie on two stages. A virtual stage of one layer takes one level.
TWINS = {
    "": {},
    "one_level": dict(vision=dict(deepstack_visual_indexes=[1])),
    "odd_heads": dict(vision=dict(num_heads=3), tie=True),
}


def make_check(name, directory):
    write = partial(write_tiny_qwen3_vl, **TWINS[name])
    return family_check("qwen3_vl", directory, write, make_samples, ROWS)


def fit(cases):
    """Virtual stages, which are of one layer, on the twin of one level."""
    return [replace(case, twin="one_level") if case.vp and not case.twin else case for case in cases]


OWN = [
    Case(tp=2, cp=2, vision="share", updates=2),
    Case(pp=2, layers=(1, 3), recompute=True, updates=2),  # the second level is added on the second stage
]


@pytest.mark.parametrize("case", fit([*PAIRWISE_SMALL, *OWN]), ids=str)
def test_layout_equals_one_process(checks, case):
    checks(case.twin).check(case)


MORE = [
    Case(pp=2, layers=(0, 4)),
    Case(pp=2, dp=2, layers=(1, 3), vision="ahead", do=True, overlap=True),
    Case(pp=2, tp=2, sp=True, layers=(1, 3), recompute=True),
    Case(pp=2, cp=2, layers=(1, 3), vision="share"),
]
ODD = [case for case in whole_matrix("odd_heads") if not case.vp]


@pytest.mark.full
@pytest.mark.parametrize("case", fit([*MORE, *PAIRWISE_MORE, *whole_matrix(), *ODD]), ids=str)
def test_whole_matrix(checks, case):
    checks(case.twin).check(case)


def test_a_virtual_stage_too_small_for_the_levels_is_refused(checks):
    message = r"ConfigError: .* virtual stages of rank 0 holds 1 decoder layers.* behind the first 2 \(DeepStack\)"
    with pytest.raises(RankError, match=message):
        checks("").check(Case(pp=2, vp=1))
