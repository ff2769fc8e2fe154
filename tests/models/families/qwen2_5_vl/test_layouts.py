"""Every layout trains Qwen2.5-VL as one process does: positions and windows go with the tokens and images."""

from functools import partial

import pytest

from megatron_vlm.testing.layouts import PAIRWISE_MORE, PAIRWISE_SMALL, Case, family_check, whole_matrix
from megatron_vlm.testing.twins.qwen2_5_vl import make_samples, write_tiny_qwen2_5_vl

# Texts first, so that a rank without images meets one with; 0, 1 and 3 images, most of several windows.
ROWS = [[([], 23)], [([(3, 4)], 14), ([], 9)], [([(1, 2), (4, 3), (2, 2)], 7)], [([], 17)]]
# A video is (rows, columns, pairs of frames, seconds of a pair); with images in a sample, and on ranks of its own.
VIDEO_ROWS = [
    [([], 23)],
    [([(2, 3), (3, 2, 3, 1.3)], 14), ([], 9)],
    [([(1, 1, 4, 0.7), (4, 3), (2, 3, 2, 2.0)], 7)],
    [([], 17)],
]
VIDEOS = [
    Case(twin="videos", cp=2, vision="share", updates=2),
    *(
        pytest.param(case, marks=pytest.mark.full)
        for case in (
            Case(twin="videos", tp=2, sp=True),
            Case(twin="videos", tp=2, cp=2, vision="share", updates=2),
            Case(twin="videos", cp=2),
            Case(twin="videos", pp=2),
            Case(twin="videos", pp=2, tp=2, vision="share"),
            Case(twin="videos", cp=2, dp=2, vision="ahead", updates=2),
        )
    ),
]
TWINS = {"": {}, "odd_heads": dict(vision=dict(num_heads=3), tie=True), "videos": {}}


def make_check(name, directory):
    write = partial(write_tiny_qwen2_5_vl, **TWINS[name])
    return family_check("qwen2_5_vl", directory, write, make_samples, VIDEO_ROWS if name == "videos" else ROWS)


@pytest.mark.parametrize("case", [*PAIRWISE_SMALL, Case(tp=2, cp=2, vision="share", updates=2), *VIDEOS], ids=str)
def test_layout_equals_one_process(checks, case):
    checks(case.twin).check(case)


@pytest.mark.full
@pytest.mark.parametrize("case", [*PAIRWISE_MORE, *whole_matrix(), *whole_matrix("odd_heads")], ids=str)
def test_whole_matrix(checks, case):
    checks(case.twin).check(case)
