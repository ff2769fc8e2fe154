"""Every layout trains SmolVLM as one process does."""

from functools import partial

import pytest

from megatron_vlm.testing.layouts import PAIRWISE_MORE, PAIRWISE_SMALL, Case, family_check, whole_matrix
from megatron_vlm.testing.twins.smolvlm import make_samples, write_tiny_smolvlm

# Texts first, so that a rank without images meets one with; 0, 1 and 5 tiles.
ROWS = [[(0, 23)], [(2, 14), (0, 9)], [(5, 7)], [(0, 17)]]
TWINS = {"": {}, "odd_heads": dict(kind="Idefics3", vision=dict(num_attention_heads=3))}


def make_check(name, directory):
    write = partial(write_tiny_smolvlm, **TWINS[name])
    return family_check("smolvlm", directory, write, make_samples, ROWS, "model.vision_model.")


@pytest.mark.parametrize(
    "case",
    [*PAIRWISE_SMALL, Case(tp=2, twin="odd_heads", updates=3), Case(tp=2, cp=2, vision="share", updates=2)],
    ids=str,
)
def test_layout_equals_one_process(checks, case):
    checks(case.twin).check(case)


@pytest.mark.full
@pytest.mark.parametrize("case", [*PAIRWISE_MORE, *whole_matrix(), *whole_matrix("odd_heads")], ids=str)
def test_whole_matrix(checks, case):
    checks(case.twin).check(case)
