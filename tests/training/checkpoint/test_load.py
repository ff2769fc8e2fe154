"""Any layout and kind of optimizer loads any checkpoint: bit for bit, and training goes on as if it had not stopped."""

from pathlib import Path

import pytest

from megatron_vlm import registry
from megatron_vlm.files import read_json
from megatron_vlm.testing.distributed import run_distributed
from tests.training.checkpoint.ranks import VOCAB_MULTIPLE, leg, merge, same_bits

# Relative distance of loss and gradient norm in the steps after a change of layout.
CONTINUED = 1e-5  # fp32; measured 4e-7. bf16: as far as transformers in bf16 is from fp32 on this processor (``calm``)


def at(
    tp=1,
    pp=1,
    dp=1,
    *,
    cp=1,
    vision="auto",
    vp=None,
    layers=None,
    do=False,
    overlap=False,
    sp=False,
    shard="",
    host=0.0,
    **options,
):
    parallel = dict(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        vision_parallel=vision,
        num_layers_per_virtual_pipeline_stage=vp,
        decoder_layers_per_stage=layers,
        sequence_parallel=sp,
        data_parallel_sharding=shard or ("optimizer" if do else "none"),
        overlap_grad_reduce=overlap,
        ddp_bucket_size=3000 if overlap else None,
        offload="optimizer" if host else "none",
        offload_fraction=host or 1.0,
    )
    return (tp, pp, dp, cp), parallel, options


BF16 = dict(params_dtype="bf16")
SHARDED = dict(do=True, overlap=True)
CHAINS = {
    "plain": ("mistral", [at(), at(2), at(1, 2), at(1, 1, 2), at(2, 2), at()]),
    "sharded": (
        "mistral",
        [at(do=True), at(2, **SHARDED), at(1, 2, **SHARDED), at(1, 1, 2, **SHARDED), at(2, 2, **SHARDED), at(do=True)],
    ),
    "buckets": (
        "mistral",
        [at(2, 1, 2, **SHARDED), at(1, 1, 4, **SHARDED), at(1, 1, 3, **SHARDED), at(2, sp=True)],
    ),
    "fully_sharded": (
        "mistral",
        [
            at(),
            at(1, 1, 2, do=True),
            at(1, 1, 4, shard="parameters"),
            at(2, 1, 2, sp=True, shard="gradients"),
            at(),
        ],
    ),
    "fully_sharded_bf16": (
        "calm",
        [
            at(**BF16),
            at(1, 1, 2, shard="gradients", **BF16),
            at(2, cp=2, sp=True, shard="parameters", **BF16),
            at(1, 1, 2, do=True, **BF16),
            at(1, 1, 4, shard="parameters", **BF16),
            at(2, **BF16),
        ],
    ),
    "fully_sharded_frozen": (
        "tied",
        [
            at(1, 1, 4, shard="parameters", freeze=("llm",)),
            at(1, 2, freeze=("llm",)),
            at(1, 1, 2, shard="gradients", freeze=("llm",)),
            at(freeze=("llm",)),
        ],
    ),
    "virtual_tied": ("tied", [at(1, 2, vp=1), at(2, 2, vp=1), at(1, 2, 2, **SHARDED), at(), at(1, 4)]),
    "context": ("mistral", [at(), at(cp=2), at(cp=2, dp=2, **SHARDED), at(), at(2, cp=2, sp=True), at(2)]),
    "shared_tower": (
        "mistral",
        [at(2, cp=2, sp=True, vision="share"), at(1, 2, 2, vision="ahead", **SHARDED), at(do=True)],
    ),
    "ahead_bf16": (
        "calm",
        [at(1, 2, 2, vision="ahead", **SHARDED, **BF16), at(2, 2, vision="ahead", vp=1, **BF16), at(**BF16)],
    ),
    "uneven": ("tied", [at(1, 2), at(1, 2, layers=(0, 4)), at(1, 3), at(1, 2, layers=(0, 1, 1, 2), do=True), at()]),
    "deep": (
        "deep",
        [at(1, 8), at(1, 4), at(1, 8, layers=(0, 5, 5, 4, 4, 4, 4, 2), do=True), at(1, 2, layers=(9, 5, 5, 9)), at()],
    ),
    "frozen_stage": (
        "mistral",
        [
            at(1, 2, freeze=("llm",)),
            at(1, 1, freeze=("llm",)),
            at(1, 2, 2, freeze=("llm",), **SHARDED),
            at(2, 2, freeze=("llm",)),
        ],
    ),
    "host": (
        "mistral",
        [at(), at(host=1.0), at(1, 1, 2, host=0.5, **SHARDED), at(2, host=1.0), at(1, 2, host=1.0, do=True), at(2)],
    ),
    "bf16": (
        "calm",
        [
            at(1, 1, 2, **SHARDED, **BF16),
            at(2, **BF16),
            at(1, 1, 2, **BF16),
            at(2, 1, 2, **SHARDED, **BF16),
            at(**BF16),
        ],
    ),
}

BY_DEFAULT = ("plain", "shared_tower", "fully_sharded")


def mapping_of(hf_dir, tp, whole=()):
    spec = registry.get("idefics2")
    mapping = spec.mapping(spec.config(read_json(Path(hf_dir) / "config.json")), tp=tp)
    return mapping.padded(VOCAB_MULTIPLE).whole(*whole)


def run_leg(hf_dir, where, checkpoint):
    """Results by rank; the full tensors of both snapshots with the first."""
    (tp, pp, dp, cp), parallel, options = where
    results = run_distributed(leg, hf_dir, parallel, options, checkpoint, tp=tp, pp=pp, dp=dp, cp=cp)
    dealt = parallel["vision_parallel"] != "auto"
    mapping = mapping_of(hf_dir, tp, ("vision", "connector") if dealt else ())
    for moment in ("loaded", "saved"):
        results[0][f"{moment}_full"] = merge([r[moment] for r in results], mapping)
    return results


def assert_same(loaded, saved):
    assert sorted(loaded) == sorted(saved)
    assert not [key for key in loaded if not same_bits(loaded[key], saved[key])]


def assert_continued(resumed, uninterrupted, bar):
    distances = [abs(a - b) / b for one, other in zip(resumed, uninterrupted) for a, b in zip(one, other)]
    print(f"worst relative distance {max(distances):.1e}, {max(distances) / bar:.2f} of the bar")
    assert max(distances) <= bar


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in BY_DEFAULT else pytest.mark.full) for name in CHAINS]
)
def test_chain(twins, calm, tmp_path, name):
    """Each leg loads what the one before saved, and takes the same three steps that the other took after saving."""
    twin, legs = CHAINS[name]
    hf_dir, bar = calm if twin == "calm" else (twins(twin), CONTINUED)
    save, before = str(tmp_path), None
    for number, where in enumerate(legs):
        results = run_leg(hf_dir, where, {"save": save, "load": save if number else None, "keep_last": 2})
        first, parallel = results[0], where[1]
        assert all(r["saved"]["padded_rows"] == 0 for r in results)  # what a checkpoint leaves out
        if parallel["overlap_grad_reduce"]:
            buckets = [bucket for r in results for bucket in r["loaded"]["buckets"]]
            assert len(buckets) > len(results)
            assert where[0][2] == 1 or any(size != unpadded for size, unpadded in buckets)
        if before is not None:
            assert_same(first["loaded_full"], before["saved_full"])
            assert {r["found"].iteration for r in results} == {3 * number}
            assert first["found"].state == {"iteration": 3 * number, "seed": 7}
            assert_continued(first["resumed"], before["uninterrupted"], bar)
        assert {step for _, _, _, _, step, _ in first["saved"]["state"]} <= {3.0 * (number + 1)}
        before = first
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"iter_{3 * (len(legs) - 1):07d}",
        f"iter_{3 * len(legs):07d}",
        "latest_checkpointed_iteration.txt",
    ]


def test_same_layout_continues_bit_for_bit(twins, tmp_path):
    """With the optimizer on the host and without, in turn."""
    plain, host = (at(2, 1, 2, sp=True, host=share, **SHARDED, **BF16) for share in (0.0, 1.0))
    before = run_leg(twins("mistral"), plain, {"save": str(tmp_path)})[0]
    for where in (host, plain):
        again = run_leg(twins("mistral"), where, {"load": str(tmp_path), "save": str(tmp_path)})[0]
        assert again["resumed"] == before["uninterrupted"]
        assert_same(again["loaded_full"], before["saved_full"])
        before = again
