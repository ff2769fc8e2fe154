"""Every layout trains LLaVA-InternLM2 as one process does, from a tower that tensor parallelism splits and one it cannot."""

import json
from pathlib import Path

import pytest

from megatron_vlm import registry
from megatron_vlm.testing.layouts import PAIRWISE_MORE, PAIRWISE_SMALL, Case, LayoutCheck, whole_matrix
from megatron_vlm.testing.twins.llava_internlm2 import make_samples, write_tiny_llava, write_tiny_llava_internlm2

# Texts first, so that a rank without images meets one with.
ROWS = [[(0, 23)], [(1, 14), (0, 9)], [(2, 7)], [(0, 17)]]
TWINS = {
    "": write_tiny_llava_internlm2,
    "odd_heads": lambda directory: write_tiny_llava(directory, tie=True, num_attention_heads=3),
}


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            directory = str(tmp_path_factory.mktemp(name or "twin"))
            TWINS[name](directory)
            hf_config = json.loads(Path(directory, "config.json").read_text())
            config = registry.get("llava_internlm2").config(hf_config)
            made[name] = LayoutCheck(
                family="llava_internlm2",
                directory=directory,
                hf_config=hf_config,
                batches=[make_samples(config, row, seed=i) for i, row in enumerate(ROWS)],
                fill=64,
                no_true_gradient=lambda n: n.startswith("vision_tower") and n.endswith("k_proj.bias"),
            )
        return made[name]

    return make


@pytest.mark.parametrize("case", [*PAIRWISE_SMALL, Case(tp=2, pp=2, twin="odd_heads")], ids=str)
def test_layout_equals_one_process(checks, case):
    checks(case.twin).check(case)


@pytest.mark.full
@pytest.mark.parametrize("case", [*PAIRWISE_MORE, *whole_matrix(), *whole_matrix("odd_heads")], ids=str)
def test_whole_matrix(checks, case):
    checks(case.twin).check(case)
