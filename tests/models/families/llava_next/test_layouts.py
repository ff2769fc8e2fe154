"""Every layout trains LLaVA-NeXT and LLaVA-OneVision as one process does."""

from functools import partial

import pytest

from megatron_vlm.testing.layouts import PAIRWISE_MORE, PAIRWISE_SMALL, Case, family_check, whole_matrix
from megatron_vlm.testing.twins.llava_next import make_samples, write_tiny_llava_next

# Texts first, so that a rank without images meets one with; images of four, two and three views, and of two in one sample.
ROWS = [[([], 23)], [([(84, 23)], 14), ([], 9)], [([(28, 50), (50, 20)], 7)], [([], 17)]]
TWINS = {"": {}, "onevision": dict(kind="LlavaOnevision", vision=dict(num_attention_heads=3), tie=True)}


def make_check(name, directory):
    write = partial(write_tiny_llava_next, **TWINS[name])
    return family_check("llava_next", directory, write, make_samples, ROWS, "vision_tower.", fill=128)


@pytest.mark.parametrize(
    "case",
    [
        PAIRWISE_SMALL[1],
        Case(tp=2, cp=2, vision="share", updates=2),
        Case(cp=2, pp=2, vision="ahead", updates=2, twin="onevision"),
    ],
    ids=str,
)
def test_layout_equals_one_process(checks, case):
    checks(case.twin).check(case)


@pytest.mark.full
@pytest.mark.parametrize(
    "case", [*PAIRWISE_SMALL, *PAIRWISE_MORE, *whole_matrix(), *whole_matrix("onevision")], ids=str
)
def test_whole_matrix(checks, case):
    checks(case.twin).check(case)
