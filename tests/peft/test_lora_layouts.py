"""Every layout trains adapters as one process does: see testing/layouts.py. Stages without anything to train included."""

import pytest

from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.testing.layouts import Case, idefics2_check, whole_matrix
from megatron_vlm.testing.twins.peft import random_pairs

EVERYTHING = dict(target_modules=r".*(_proj|fc1|fc2|lm_head)", modules_to_save=("modality_projection",), r=3, alpha=6)
TWINS = {
    "": (dict(text="mistral", sliding_window=11), EVERYTHING),
    # Heads that no tensor parallel size divides: tower and perceiver attention run whole on every rank.
    "odd_heads": (dict(text="llama", vision_heads=3, perceiver_heads=3, perceiver_kv_heads=3, seed=1), EVERYTHING),
    # More ranks than kv heads: each has another share of q, k and v.
    "one_kv_head": (dict(text="llama", kv_heads=2, perceiver_kv_heads=1), EVERYTHING),
    # Only some parts of fused linears and biases.
    "mixed": (
        dict(text="mistral"),
        dict(
            target_modules=("v_proj", "k_proj", "up_proj"),
            modules_to_save=("lm_head",),
            bias="lora_only",
            alpha=4,
            rslora=True,
        ),
    ),
    # One linear of the last layer: of four stages one trains.
    "last": (dict(text="mistral"), dict(target_modules=("layers.3.self_attn.v_proj",))),
    # Over a base in 4 bits; columns and rows of no linear of the decoder divide into whole blocks.
    "nf4": (
        dict(text="mistral"),
        dict(
            target_modules=("q_proj", "down_proj", "fc2"),
            quantize="nf4",
            quantize_groups=("llm", "vision", "connector"),
        ),
    ),
    # The tower alone: gradients pass through a decoder without pairs.
    "tower": (dict(text="mistral"), dict(target_modules=r".*vision_model.*_proj")),
}


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    """Twin -> its LayoutCheck, made when first asked for."""
    made = {}

    def make(name):
        if name not in made:
            model, settings = TWINS[name]
            directory = tmp_path_factory.mktemp(name or "twin")
            made[name] = idefics2_check(directory, **model)
            with open_source(directory) as source:
                made[name].peft = {"tensors": random_pairs(source, settings), **settings}
        return made[name]

    return make


PAIRWISE = [
    Case(tp=2, dp=2, sp=True, do=True, overlap=True, updates=3),
    Case(pp=4, twin="last", updates=2),
    Case(cp=2, dp=2, do=True, twin="nf4", updates=2),
    Case(tp=2, cp=2, sp=True, recompute=True, twin="mixed", updates=2),
    Case(tp=2, pp=2, vision="ahead", updates=2),
    Case(dp=4, shard="parameters", group=2, twin="nf4", updates=2),
    Case(tp=2, dp=2, sp=True, shard="parameters", twin="mixed", recompute=True, updates=2),
]
OTHERS = [
    dict(tp=4, sp=True, recompute=True),
    dict(tp=2, dp=2, do=True, overlap=True),
    dict(tp=2, pp=2, vp=1, sp=True, recompute=True),
    dict(pp=2, dp=2, overlap=True, recompute=True),
    dict(pp=2, cp=2, vp=1, vision="ahead", recompute=True),
    dict(tp=2, dp=2, vision="share", do=True, overlap=True),
]
WHOLE = [
    Case(tp=2, pp=2, sp=True, vp=1, recompute=True, twin="mixed", updates=2),
    Case(tp=4, twin="one_kv_head", updates=1),
    *whole_matrix(recomputes=(False, True)),
    *(Case(twin=name, **layout) for name in TWINS if name for layout in OTHERS),
]


@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_layout_equals_one_process(checks, case):
    checks(case.twin).check(case)


@pytest.mark.full
@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_whole_matrix(checks, case):
    checks(case.twin).check(case)
