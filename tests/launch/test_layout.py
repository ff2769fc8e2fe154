"""Layouts that fit: chosen in order of speed, by the estimate."""

from dataclasses import replace

import pytest

from megatron_vlm import registry
from megatron_vlm.launch.layout import GIB, USABLE, Layout, candidates, choose_layout
from megatron_vlm.testing import shapes
from megatron_vlm.testing.distributed import RankError, run_alone
from megatron_vlm.testing.memory import Case
from megatron_vlm.training.memory.estimate import estimate
from megatron_vlm.training.memory.stages import RowShape

FULL, QLORA = {}, dict(target_modules="all-linear", r=16, quantize="nf4")


def make_case(family: str = "internvl3", **settings) -> Case:
    return Case(
        name="",
        family=family,
        model_config=shapes.small()[family],
        row=RowShape(segments=(256,), images=((3, 112, 112),)),
        microbatches=settings.pop("microbatches", 8),
        **settings,
    )


def choices(case: Case, gpus: int, shares: list[float]) -> list[Layout]:
    """Layouts for GPUs that hold these shares of what one GPU alone would need."""
    spec, config = registry.get(case.family), case.config()
    (whole,) = estimate(config, spec, case.model_config, 1, "cpu", row=case.row)
    return [
        choose_layout(config, spec, case.model_config, gpus, int(share * whole.total), device_kind="cpu", row=case.row)
        for share in shares
    ]


def test_less_memory_gives_slower_layouts_that_fit():
    roomy, tight, tighter = run_alone(choices, make_case(), 4, [1.1, 0.6, 0.25])
    assert (roomy.tp, roomy.pp, roomy.dp, roomy.recompute) == (1, 1, 4, False)
    assert "dp 4: the fastest" in roomy.reason and roomy.distributed_optimizer and roomy.accumulation == 2
    assert roomy.slowness < tight.slowness < tighter.slowness
    assert tighter.tp * tighter.pp == 4 and tighter.sequence_parallel == (tighter.tp > 1)
    assert "would need at least" in tight.reason and "\n" not in tight.reason
    for layout, share in zip((roomy, tight, tighter), (1.1, 0.6, 0.25)):
        limit = layout.need / share / USABLE
        assert layout.need <= USABLE * share * limit + 1
        run = layout.apply(make_case().config())
        assert run.check_world(4) == layout.dp and run.parallel.sequence_parallel == (layout.tp > 1)


def test_nothing_fits():
    with pytest.raises(
        RankError,
        match=r"nothing fits 2 GPUs of 0.0 GiB: the least, .* needs at least .* GiB, of which .* Use more GPUs",
    ):
        run_alone(choices, make_case(), 2, [0.01])


def test_candidates_divide_the_model_and_the_batch():
    case = make_case(microbatches=4)
    found = candidates(case.config(), case.model_config, 8)
    assert {layout.dp for layout in found} == {1, 2, 4}  # 8 replicas have no whole row each
    assert {layout.tp for layout in found} == {1, 2, 4, 8} and max(layout.pp for layout in found) == 4  # 4 layers
    assert [layout.slowness for layout in found] == sorted(layout.slowness for layout in found)
    grown = candidates(case.config(), case.model_config, 8, lambda dp: replace(case, microbatches=4 * dp).config())
    assert {layout.dp for layout in grown} == {1, 2, 4, 8} and {layout.accumulation for layout in grown} == {4}


def test_larger_microbatches_come_first():
    config = make_case(microbatches=8).config()
    config = replace(config, data=replace(config.data, packing=False))
    found = candidates(config, make_case().model_config, 2, micro_batch_sizes=(4, 2, 1, 3))
    assert [layout.micro_batch_size for layout in found if layout.dp == 2 and not layout.recompute] == [4, 2, 1]
    assert found[0].apply(config).training.micro_batch_size == 4 and found[0].accumulation == 1


def published(name: str, gpus: int, gib: int, peft: dict) -> Layout:
    family, model_config = shapes.published()[name]
    case = Case(
        name=name, family=family, model_config=model_config, row=RowShape(segments=(4096,)), microbatches=64, peft=peft
    )
    return choose_layout(case.config(), registry.get(family), model_config, gpus, gib * GIB)


@pytest.mark.full
@pytest.mark.parametrize("name", ["Idefics2-8B", "InternVL3-8B", "LLaVA-InternLM2-7B"])
@pytest.mark.parametrize(("gpus", "gib", "peft"), [(8, 80, FULL), (1, 80, QLORA), (2, 48, QLORA)])
def test_models_of_8b(name, gpus, gib, peft):
    layout = run_alone(published, name, gpus, gib, peft, timeout=900)
    assert layout.need <= USABLE * gib * GIB and layout.tp * layout.pp * layout.dp == gpus
