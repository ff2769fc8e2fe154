"""Every layout trains as one process does: tensor, pipeline, sequence, data parallel and what goes with it.

Shown for gradients of the first step, and for loss and gradient norm of 10 AdamW updates at lr 1e-3.
"""

import pytest
import torch

from megatron_vlm.data.types import row_from_samples
from megatron_vlm.models import registry
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import gradient_errors, layout_run, merge_gradients, random_samples
from megatron_vlm.testing.twins import write_tiny_idefics2

LOSS = 1e-5  # relative; measured 4e-6 after 10 updates
NORM = 1e-3  # relative, over 10 updates; measured 4e-5
STEPS = 10
GRADIENT = 1e-5  # of each gradient's norm; measured 4e-6
ZERO_GRADIENTS = ("vision_model", ".self_attn.k_proj.bias")  # round-off on both sides, see test_parity.py

TEXT_ONLY_FIRST = [
    [([], 23)],
    [([(40, 50)], 14), ([], 9)],
    [([(24, 48), (16, 16)], 7)],
    [([], 17)],
]
TWINS = {
    "mistral": dict(text="mistral", sliding_window=11),
    "tied": dict(text="llama", tie=True),
    # Heads that no tensor parallel size divides: tower and perceiver attention run whole on every rank.
    "odd_heads": dict(text="llama", vision_heads=3, perceiver_heads=3, perceiver_kv_heads=3),
    "one_kv_head": dict(text="llama", kv_heads=2, perceiver_kv_heads=1),
}


def layout(tp=1, pp=1, dp=1, *, sp=False, vp=None, do=False, overlap=False, recompute=False, freeze=(), twin="mistral"):
    parallel = dict(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=sp,
        num_layers_per_virtual_pipeline_stage=vp,
        use_distributed_optimizer=do,
        overlap_grad_reduce=overlap,
        recompute_granularity="full" if recompute else None,
    )
    flags = dict(sp=sp, vp=vp, do=do, overlap=overlap, recompute=recompute)
    name = (
        f"{twin}-tp{tp}pp{pp}dp{dp}"
        + "".join(f"-{k}" for k, v in flags.items() if v)
        + "".join(f"-no_{g}" for g in freeze)
    )
    return pytest.param((tp, pp, dp), parallel, tuple(freeze), twin, id=name)


PAIRWISE = [
    layout(2, twin="odd_heads"),
    layout(2, 1, 2, sp=True, do=True, overlap=True),
    layout(4, sp=True, recompute=True),
    layout(4, twin="one_kv_head", freeze=["vision"]),
    layout(1, 2, 2, overlap=True, twin="tied"),
    layout(1, 2, 1, vp=1, recompute=True),
    layout(1, 4),
    layout(2, 2, 1, sp=True, twin="tied", recompute=True),
    layout(2, 2, 1, sp=True, vp=1, freeze=["llm"]),
    layout(1, 1, 4, do=True, overlap=True),
    layout(1, 2, 2, do=True, vp=1, freeze=["vision", "connector"]),
    layout(1, 1, 2, overlap=True, recompute=True, freeze=["vision", "llm"]),
    layout(1, 2, 1, freeze=["llm", "connector"], recompute=True, twin="tied"),
]
WHOLE = [
    layout(tp, pp, dp, sp=sp, vp=vp, do=do, overlap=overlap, recompute=recompute, freeze=freeze, twin=twin)
    for twin in TWINS
    for tp, pp, dp in [
        (1, 1, 2),
        (1, 1, 4),
        (1, 2, 1),
        (1, 2, 2),
        (1, 4, 1),
        (2, 1, 1),
        (2, 1, 2),
        (2, 2, 1),
        (4, 1, 1),
    ]
    for sp in ([False, True] if tp > 1 else [False])
    for vp in ([None, 1] if pp == 2 else [None])
    for do, overlap in ([(False, False), (True, True)] if dp > 1 else [(False, False)])
    for recompute in ((False, True) if twin == "mistral" else (False,))
    for freeze in (((), ("llm",), ("vision",), ("vision", "connector")) if twin == "mistral" else ((),))
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(twin, frozen groups) -> directory, config, loss and gradients of one process."""
    directories, made = {}, {}

    def make(twin, freeze):
        if twin not in directories:
            directory = str(tmp_path_factory.mktemp(twin))
            directories[twin] = directory, write_tiny_idefics2(directory, **TWINS[twin]).config.to_dict()
        directory, hf_config = directories[twin]
        config = registry.get("idefics2").config(hf_config)
        if (twin, freeze) not in made:
            rows = [row_from_samples(random_samples(config, s, seed=i)) for i, s in enumerate(TEXT_ONLY_FIRST)]
            results = run_distributed(layout_run, directory, rows, {}, {"freeze": freeze}, STEPS)
            mapping = registry.get("idefics2").mapping(config, tp=1, vocab_multiple=8)
            made[twin, freeze] = *merge_gradients(results, mapping, config.text.vocab_size), results[0]["history"]
        return directory, config, *made[twin, freeze]

    return make


def check(reference, sizes, parallel, freeze, twin):
    tp, pp, dp = sizes
    directory, config, loss, grads, history = reference(twin, freeze)
    fill = 48 if parallel["num_layers_per_virtual_pipeline_stage"] else 0
    rows = [
        row_from_samples(
            random_samples(config, s, seed=i), multiple_of=tp if parallel["sequence_parallel"] else 1, fill_to=fill
        )
        for i, s in enumerate(TEXT_ONLY_FIRST)
    ]
    results = run_distributed(layout_run, directory, rows, parallel, {"freeze": freeze}, STEPS, tp=tp, pp=pp, dp=dp)
    mapping = registry.get("idefics2").mapping(config, tp=tp, vocab_multiple=8)
    our_loss, our_grads = merge_gradients(results, mapping, config.text.vocab_size)
    assert abs(our_loss - loss) <= LOSS * loss
    errors = gradient_errors(our_grads, grads)
    worst = max(
        ((e, n) for n, e in errors.items() if not (ZERO_GRADIENTS[0] in n and n.endswith(ZERO_GRADIENTS[1]))),
        default=(0.0, ""),
    )
    print(f"loss {abs(our_loss - loss) / loss:.1e} worst gradient {worst[0]:.1e} {worst[1]}")
    assert worst[0] <= GRADIENT
    assert any(float(g.norm()) > 0 for g in grads.values())
    for result in results:
        loss_error = max(abs(x - y) / y for (x, _), (y, _) in zip(result["history"], history, strict=True))
        norm_error = max(abs(x - y) / y for (_, x), (_, y) in zip(result["history"], history, strict=True))
        assert loss_error <= LOSS and norm_error <= NORM, (loss_error, norm_error)
    print(
        f"{STEPS} updates: loss {history[0][0]:.4f} -> {history[-1][0]:.4f}, off {loss_error:.1e}; norm {norm_error:.1e}"
    )


@pytest.mark.parametrize("sizes, parallel, freeze, twin", PAIRWISE)
def test_layout_equals_one_process(reference, sizes, parallel, freeze, twin):
    check(reference, sizes, parallel, freeze, twin)


@pytest.mark.full
@pytest.mark.parametrize("sizes, parallel, freeze, twin", WHOLE)
def test_whole_matrix(reference, sizes, parallel, freeze, twin):
    check(reference, sizes, parallel, freeze, twin)


def test_gradients_are_reduced_in_fp32(tmp_path):
    """bf16 weights on 2 data parallel ranks, 16 microbatches each: fp32 buffers by default, and what they are worth."""
    hf = write_tiny_idefics2(tmp_path)
    config = registry.get("idefics2").config(hf.config.to_dict())
    rows = [row_from_samples(random_samples(config, [([(16, 24)], 8)], seed=i)) for i in range(32)]
    mapping = registry.get("idefics2").mapping(config, tp=1, vocab_multiple=8)

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
    assert error < 1.02 * coarse_error
