"""Every layout trains InternLM2 as one process does, samples beyond the trained positions among them."""

import json
from dataclasses import replace

import pytest

from megatron_vlm.testing.layouts import EIGHT, PAIRWISE_MORE, PAIRWISE_SMALL, LayoutCheck, whole_matrix
from megatron_vlm.testing.twins.internlm2 import make_samples, write_tiny_internlm2

LENGTHS = [[23, 31], [14, 9, 20], [52], [17, 30]]
POSITIONS = 32


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("internlm2")
    llama = write_tiny_internlm2(directory, max_position_embeddings=POSITIONS)
    return LayoutCheck(
        family="internlm2",
        directory=str(directory),
        hf_config=json.loads((directory / "config.json").read_text()),
        batches=[make_samples(llama.config.vocab_size, row, seed=i) for i, row in enumerate(LENGTHS)],
        fill=56,
    )


@pytest.mark.parametrize("case", [case for case in PAIRWISE_SMALL if not case.freeze], ids=str)
def test_layout_equals_one_process(layouts, case):
    layouts.check(case)


@pytest.mark.full
@pytest.mark.parametrize(
    "case",
    [
        *PAIRWISE_MORE[:2],
        *EIGHT[:3],
        replace(EIGHT[3], vision="auto"),
        *(case for case in whole_matrix() if "llm" not in case.freeze),
    ],
    ids=str,
)
def test_whole_matrix(layouts, case):
    layouts.check(case)
