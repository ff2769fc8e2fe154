"""Every layout trains InternVL3 as one process does."""

from functools import partial

import pytest

from megatron_vlm.testing.layouts import PAIRWISE_MORE, PAIRWISE_SMALL, Case, family_check, whole_matrix
from megatron_vlm.testing.twins.internvl3 import make_samples, write_tiny_internvl3

# Texts first, so that a rank without images meets one with; 0, 1 and 3 images of several tiles.
ROWS = [[([], 23)], [([2], 14), ([], 9)], [([1, 3], 7)], [([], 17)]]
TWINS = {
    # In the tower, queries and keys normed over heads that lie on several ranks; in the decoder each head, by a weight that
    # ranks share. As of InternVL3.5-38B.
    "": dict(
        vision=dict(attention_bias=False, use_qk_norm=True, norm_type="rms_norm"),
        text=dict(model_type="qwen3", head_dim=12, num_key_value_heads=2),
    ),
    "odd_heads": dict(vision=dict(num_attention_heads=3), tie=True),
}


def make_check(name, directory):
    write = partial(write_tiny_internvl3, **TWINS[name])
    return family_check("internvl3", directory, write, make_samples, ROWS, "vision_tower.")


@pytest.mark.parametrize(
    "case",
    [
        *PAIRWISE_SMALL,
        Case(tp=4, updates=2),  # more ranks than key/value heads
        Case(tp=2, twin="odd_heads"),
        Case(tp=2, cp=2, vision="share", updates=2),
    ],
    ids=str,
)
def test_layout_equals_one_process(checks, case):
    checks(case.twin).check(case)


@pytest.mark.full
@pytest.mark.parametrize("case", [*PAIRWISE_MORE, *whole_matrix(), *whole_matrix("odd_heads")], ids=str)
def test_whole_matrix(checks, case):
    checks(case.twin).check(case)
