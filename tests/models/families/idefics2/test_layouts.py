"""Idefics2 in every layout equals one process: see testing/layouts.py. And gradients are reduced in fp32."""

import dataclasses

import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.testing.distributed import RankError, run_distributed
from megatron_vlm.testing.layouts import EIGHT, Case, idefics2_check, whole_matrix
from megatron_vlm.testing.parity import layout_run, merge_gradients, random_samples
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2

TWINS = {
    "mistral": dict(text="mistral", sliding_window=11),
    "tied": dict(text="llama", tie=True),
    # Heads that no tensor parallel size divides: tower and perceiver attention run whole on every rank.
    # With seed 0 a change of all weights in the last bit moves the loss after 10 updates by 1.5e-5 to 1.4e-4 on one process
    # already: such a twin cannot tell layouts apart at 1e-5. With seed 1 it moves by 1.5e-6.
    "odd_heads": dict(text="llama", vision_heads=3, perceiver_heads=3, perceiver_kv_heads=3, seed=1),
    "one_kv_head": dict(text="llama", kv_heads=2, perceiver_kv_heads=1),
    # As deep as InternVL3-8B and Qwen2.5-VL-7B, whose layers 8 stages do not divide; std 0.15 would multiply round-off.
    "deep": dict(text="llama", layers=28, std=0.05),
}
PAIRWISE = [
    Case(tp=2, twin="odd_heads"),
    Case(tp=2, dp=2, sp=True, do=True, overlap=True, twin="mistral"),
    Case(tp=4, sp=True, recompute=True, twin="mistral", updates=3),
    Case(tp=4, twin="one_kv_head", freeze=("vision",), updates=3),
    Case(pp=2, dp=2, overlap=True, twin="tied"),
    Case(pp=2, vp=1, recompute=True, twin="mistral"),
    Case(pp=4, twin="mistral"),
    Case(tp=2, pp=2, sp=True, twin="tied", recompute=True),
    Case(tp=2, pp=2, sp=True, vp=1, freeze=("llm",), twin="mistral"),
    Case(dp=4, do=True, overlap=True, twin="mistral"),
    Case(pp=2, dp=2, do=True, vp=1, freeze=("vision", "connector"), twin="mistral"),
    Case(dp=2, overlap=True, recompute=True, freeze=("vision", "llm"), twin="mistral"),
    Case(pp=2, freeze=("llm", "connector"), recompute=True, twin="tied"),
    Case(pp=2, layers=(0, 4), twin="mistral", updates=3),
    Case(pp=3, twin="tied", do=True, updates=3),
    Case(pp=2, cp=2, layers=(0, 1, 2, 1), twin="tied", recompute=True, updates=3),
    Case(cp=2, twin="mistral"),
    Case(tp=2, cp=2, sp=True, twin="mistral", updates=3),
    Case(dp=2, cp=2, do=True, overlap=True, twin="one_kv_head"),
    Case(dp=4, shard="parameters", freeze=("vision",), recompute=True, twin="tied", updates=3),
    Case(tp=2, dp=2, sp=True, shard="gradients", twin="mistral", updates=3),
]
FREEZES = ((), ("llm",), ("vision",), ("vision", "connector"))
WHOLE = [
    Case(pp=8, twin="deep"),
    Case(pp=8, layers=(0, 5, 5, 4, 4, 4, 4, 2), twin="deep"),
    *(dataclasses.replace(case, twin="mistral") for case in EIGHT),
    *whole_matrix("mistral", FREEZES, (False, True)),
    *(case for twin in ("tied", "odd_heads", "one_kv_head") for case in whole_matrix(twin)),
]


def make_check(name, directory):
    return idefics2_check(directory, **TWINS[name])


@pytest.mark.parametrize("case", [dataclasses.replace(case, updates=3) for case in PAIRWISE], ids=str)
def test_layout_equals_one_process(checks, case):
    checks(case.twin).check(case)


@pytest.mark.full
@pytest.mark.parametrize("case", dict.fromkeys([*PAIRWISE, *WHOLE]), ids=str)
def test_whole_matrix(checks, case):
    checks(case.twin).check(case)


def test_heads_that_cannot_be_exchanged_are_refused(checks):
    with pytest.raises(
        RankError, match="exchange is heads, but 2 key/value heads do not divide by tp 1 x cp 4: set gather or"
    ):
        checks("one_kv_head").check(Case(cp=4, exchange="heads", twin="one_kv_head", updates=1))


def test_a_wrong_layout_is_noticed(checks):
    """A row lost on the way of a layout is beyond every tolerance: the check can fail."""
    check = checks("mistral")
    broken = dataclasses.replace(check, batches=[*check.batches[:-1], check.batches[0]])
    broken._alone.update({(): check.alone(())})
    with pytest.raises(AssertionError):
        broken.check(Case(dp=2))


def test_gradients_are_reduced_in_fp32(tmp_path):
    """bf16 weights on 2 data parallel ranks, 16 microbatches each: fp32 buffers by default, and what they are worth."""
    hf = write_tiny_idefics2(tmp_path, std=0.05)  # does not amplify rounding, which processors do in ways of their own
    config = registry.get("idefics2").config(hf.config.to_dict())
    rows = [row_from_samples(random_samples(config, [([(16, 24)], 8)], seed=i)) for i in range(32)]
    mapping = registry.get("idefics2").mapping(config, tp=1).padded(8)

    def run(dtype, in_fp32):
        results = run_distributed(
            layout_run,
            str(tmp_path),
            rows,
            {"accumulate_allreduce_grads_in_fp32": in_fp32},
            {"params_dtype": dtype},
            dp=2,
        )
        (buffers,) = results[0]["buffer_dtypes"]
        return buffers, merge_gradients(results, mapping, config.text.vocab_size)[1]

    def norm(grads):
        return float(torch.stack([g.double().norm() for g in grads.values()]).norm())

    _, exact = run("fp32", True)
    buffers, reduced = run("bf16", True)
    assert buffers == torch.float32
    buffers, coarse = run("bf16", False)
    assert buffers == torch.bfloat16
    error, coarse_error = (norm({n: g[n] - exact[n] for n in exact}) / norm(exact) for g in (reduced, coarse))
    alone = norm({n: coarse[n] - reduced[n] for n in exact}) / norm(exact)
    print(
        f"gradient error of bf16 weights: reduced in fp32 {error:.2e}, in bf16 {coarse_error:.2e}; bf16 sums add {alone:.1e}"
    )
    assert alone > 1e-3  # what fp32 buffers save, on top of what bf16 activations cost either way
    assert error < 0.95 * coarse_error  # measured 0.87: bf16 activations cost about twice what bf16 sums do
