"""Every layout trains Qwen2.5-VL as one process does: positions and windows go with the tokens and images."""

import pytest

from megatron_vlm import registry
from megatron_vlm.testing.layouts import PAIRWISE_MORE, PAIRWISE_SMALL, Case, LayoutCheck, whole_matrix
from megatron_vlm.testing.twins.qwen2_5_vl import make_samples, write_tiny_qwen2_5_vl

# Texts first, so that a rank without images meets one with; 0, 1 and 3 images, most of several windows.
ROWS = [[([], 23)], [([(3, 4)], 14), ([], 9)], [([(1, 2), (4, 3), (2, 2)], 7)], [([], 17)]]
TWINS = {"": {}, "odd_heads": dict(vision=dict(num_heads=3), tie=True)}


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            directory = str(tmp_path_factory.mktemp(name or "twin"))
            hf_config = write_tiny_qwen2_5_vl(directory, **TWINS[name]).config.to_dict()
            config = registry.get("qwen2_5_vl").config(hf_config)
            made[name] = LayoutCheck(
                family="qwen2_5_vl",
                directory=directory,
                hf_config=hf_config,
                batches=[make_samples(config, row, seed=i) for i, row in enumerate(ROWS)],
                fill=64,
            )
        return made[name]

    return make


@pytest.mark.parametrize("case", [*PAIRWISE_SMALL, Case(tp=2, cp=2, vision="share", updates=2)], ids=str)
def test_layout_equals_one_process(checks, case):
    checks(case.twin).check(case)


@pytest.mark.full
@pytest.mark.parametrize("case", [*PAIRWISE_MORE, *whole_matrix(), *whole_matrix("odd_heads")], ids=str)
def test_whole_matrix(checks, case):
    checks(case.twin).check(case)
