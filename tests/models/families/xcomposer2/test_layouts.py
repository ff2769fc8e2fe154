"""Every layout trains InternLM-XComposer2 as one process does, branches of image tokens included."""

import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.layouts import PAIRWISE_MORE, PAIRWISE_SMALL, Case, LayoutCheck, whole_matrix
from megatron_vlm.testing.parity import layout_run, merge_gradients
from megatron_vlm.testing.twins.xcomposer2 import make_samples, write_tiny_xcomposer2

ONE = (1, 1)
# Texts first, so that a rank without images meets one with; mixed grids.
ROWS = {
    "4khd-7b": [[([], 23)], [([(1, 2)], 14), ([], 9)], [([ONE, (2, 2)], 7)], [([], 17)]],
    "7b": [[([], 23)], [([ONE], 14), ([], 9)], [([ONE, ONE], 7)], [([], 17)]],
}
TWINS = {
    "": dict(variant="4khd-7b"),
    # A tower whose heads no size divides runs whole; kv heads fewer than tensor parallel ranks.
    "odd": dict(variant="7b", vision_config={"num_attention_heads": 3, "hidden_size": 24}, num_key_value_heads=2),
}


def make_check(name, directory):
    hf_config = write_tiny_xcomposer2(directory, **TWINS[name])
    return LayoutCheck(
        family="xcomposer2",
        directory=str(directory),
        hf_config=hf_config,
        batches=[make_samples(hf_config, row, seed=i) for i, row in enumerate(ROWS[TWINS[name]["variant"]])],
        fill=64,
        no_true_gradient=lambda n: n.startswith("vit.") and n.endswith("k_proj.bias"),
    )


@pytest.mark.parametrize("case", [*PAIRWISE_SMALL, Case(pp=2, cp=2, vision="ahead", updates=2)], ids=str)
def test_layout_equals_one_process(checks, case):
    checks(case.twin).check(case)


@pytest.mark.full
@pytest.mark.parametrize(
    "case", dict.fromkeys([*PAIRWISE_MORE, *whole_matrix(recomputes=(False, True)), *whole_matrix("odd")]), ids=str
)
def test_whole_matrix(checks, case):
    checks(case.twin).check(case)


def test_text_alone_gives_branches_a_gradient_of_exactly_zero(checks):
    check = checks("")
    rows = [row_from_samples(check.batches[i], multiple_of=2) for i in (0, 3)]
    parallel = dict(tensor_model_parallel_size=2, sequence_parallel=True, overlap_grad_reduce=True)
    results = run_distributed(layout_run, check.directory, rows, parallel, {}, tp=2)
    mapping = registry.get("xcomposer2").mapping(check.config, tp=2).padded(8)
    _, grads = merge_gradients(results, mapping, check.config.text.vocab_size)
    branches = [name for name in grads if "Plora" in name]
    assert len(branches) == 2 * 5 * check.config.text.num_layers
    assert not any(grads[name].any() for name in branches)
    assert not grads["plora_sub_GN"].any() and not grads["vision_proj.0.weight"].any()
    others = [name for name in grads if name.startswith("model.layers")]
    assert all(torch.isfinite(grads[name]).all() and grads[name].any() for name in set(others) - set(branches))
