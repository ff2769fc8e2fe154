"""Every layout trains Gemma 3 as one process does: global layers by their number, images that see both ways over ranks."""

from functools import partial

import pytest

from megatron_vlm.testing.layouts import PAIRWISE_MORE, PAIRWISE_SMALL, Case, family_check, whole_matrix
from megatron_vlm.testing.twins.gemma3 import make_samples, write_tiny_gemma3

# Texts first, so that a rank without images meets one with; up to 3 images.
ROWS = [[(0, 23)], [(2, 14), (0, 9)], [(3, 7)], [(0, 17)]]
TWINS = {"": {}, "odd_heads": dict(vision=dict(num_attention_heads=3), tie=False)}
UNEVEN = Case(pp=2, layers=(3, 1), updates=2)
PLACES = [Case(tp=2, cp=2, vision="share", updates=2), Case(cp=2, exchange="heads", updates=2)]


def make_check(name, directory):
    write = partial(write_tiny_gemma3, **TWINS[name])
    return family_check("gemma3", directory, write, make_samples, ROWS, "vision_tower.vision_model.")


@pytest.mark.parametrize("case", [*PAIRWISE_SMALL, *PLACES], ids=str)
def test_layout_equals_one_process(checks, case):
    checks(case.twin).check(case)


@pytest.mark.full
@pytest.mark.parametrize("case", [UNEVEN, *PAIRWISE_MORE, *whole_matrix(), *whole_matrix("odd_heads")], ids=str)
def test_whole_matrix(checks, case):
    checks(case.twin).check(case)
