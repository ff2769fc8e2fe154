"""Every layout trains LLaVA-InternLM2 as one process does, from a tower that tensor parallelism splits and one it cannot."""

import pytest

from megatron_vlm.testing.layouts import PAIRWISE_MORE, PAIRWISE_SMALL, Case, family_check, whole_matrix
from megatron_vlm.testing.twins.llava_internlm2 import make_samples, write_tiny_llava, write_tiny_llava_internlm2

# Texts first, so that a rank without images meets one with.
ROWS = [[(0, 23)], [(1, 14), (0, 9)], [(2, 7)], [(0, 17)]]
TWINS = {
    "": write_tiny_llava_internlm2,
    "odd_heads": lambda directory: write_tiny_llava(directory, tie=True, num_attention_heads=3),
}


def make_check(name, directory):
    return family_check("llava_internlm2", directory, TWINS[name], make_samples, ROWS, "vision_tower.")


@pytest.mark.parametrize("case", [*PAIRWISE_SMALL, Case(tp=2, pp=2, twin="odd_heads")], ids=str)
def test_layout_equals_one_process(checks, case):
    checks(case.twin).check(case)


@pytest.mark.full
@pytest.mark.parametrize("case", [*PAIRWISE_MORE, *whole_matrix(), *whole_matrix("odd_heads")], ids=str)
def test_whole_matrix(checks, case):
    checks(case.twin).check(case)
