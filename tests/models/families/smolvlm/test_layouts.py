"""Every layout trains SmolVLM as one process does."""

import pytest

from megatron_vlm import registry
from megatron_vlm.testing.layouts import PAIRWISE_MORE, PAIRWISE_SMALL, Case, LayoutCheck, whole_matrix
from megatron_vlm.testing.twins.smolvlm import make_samples, write_tiny_smolvlm

# Texts first, so that a rank without images meets one with; 0, 1 and 5 tiles.
ROWS = [[(0, 23)], [(2, 14), (0, 9)], [(5, 7)], [(0, 17)]]
TWINS = {"": {}, "odd_heads": dict(kind="Idefics3", vision=dict(num_attention_heads=3))}


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            directory = str(tmp_path_factory.mktemp(name or "twin"))
            hf_config = write_tiny_smolvlm(directory, **TWINS[name]).config.to_dict()
            config = registry.get("smolvlm").config(hf_config)
            made[name] = LayoutCheck(
                family="smolvlm",
                directory=directory,
                hf_config=hf_config,
                batches=[make_samples(config, row, seed=i) for i, row in enumerate(ROWS)],
                fill=64,
                no_true_gradient=lambda n: "vision_model" in n and n.endswith("k_proj.bias"),
            )
        return made[name]

    return make


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
