"""Layouts that fit: chosen in order of speed, by the estimate."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_vlm import registry
from megatron_vlm.launch import layout as layout_module
from megatron_vlm.launch.layout import GIB, USABLE, Layout, NothingFits, candidates, choose_layout
from megatron_vlm.parallel.grid import Grid
from megatron_vlm.testing import shapes
from megatron_vlm.testing.distributed import RankError, run_alone
from megatron_vlm.testing.memory import Case
from megatron_vlm.training import balance
from megatron_vlm.training.memory.estimate import estimate
from megatron_vlm.training.memory.stages import RowShape, StageMemory

FULL, QLORA = {}, dict(target_modules="all-linear", r=16, quantize="nf4")


def make_case(family: str = "internvl3", **settings) -> Case:
    row = RowShape(segments=(256,), images=((3, 112, 112),))
    common = {"name": "", "family": family, "model_config": shapes.small()[family], "row": row, "microbatches": 8}
    return Case(**{**common, **settings})


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
    assert roomy.grid == Grid(dp=4) and roomy.name == "dp 4" and roomy.reason.startswith("dp 4: the fastest, ")
    assert roomy.config.parallel.data_parallel_sharding == "optimizer" and roomy.step.microbatches == 2
    assert roomy.step.time < tight.step.time < tighter.step.time
    assert tighter.grid.dp < 4 and tighter.config.parallel.sequence_parallel == (tighter.grid.tp > 1)
    assert "would need at least" in tight.reason and "\n" not in tight.reason
    for layout, share in zip((roomy, tight, tighter), (1.1, 0.6, 0.25)):
        limit = layout.need / share / USABLE
        assert layout.need <= USABLE * share * limit + 1
        assert layout.config.check_world(4) == layout.grid.dp


def test_the_host_is_the_last_resort_and_takes_no_more_than_it_must():
    half, all_of_it = run_alone(choices, make_case(), 1, [0.8, 0.5])
    for layout in (half, all_of_it):
        assert layout.config.parallel.offload == "optimizer" and layout.stages[0].host > 0
        assert "of the optimizer on the host: " in layout.reason.replace(", the optimizer", ", of the optimizer")
    assert half.config.parallel.offload_fraction < 1 and half.config.parallel.recompute_granularity is None
    assert all_of_it.config.parallel.offload_fraction == 1 and 0 < all_of_it.config.parallel.recompute_num_layers < 4


def test_nothing_fits():
    with pytest.raises(
        RankError,
        match=r"nothing fits 2 GPUs of 0.0 GiB: the least, .* needs at least .* GiB, of which .* Use more GPUs",
    ):
        run_alone(choices, make_case(), 2, [0.01])


def test_weights_are_shared_where_nothing_fits_without():
    """No matrix divides over 3 GPUs, and of 3 stages one has a third of the layers and the tower."""
    (layout,) = run_alone(choices, make_case(row=RowShape(segments=(16,)), microbatches=3), 3, [0.47])
    assert layout.config.parallel.data_parallel_sharding == "parameters" and layout.grid == Grid(dp=3)
    assert layout.name.startswith("dp 3, parameters sharded") and layout.config.parallel.offload == "none"


def test_candidates_divide_the_model_and_the_batch():
    case = make_case(microbatches=4)
    found = candidates(case.config(), case.model_config, 8)
    assert {layout.grid.dp for layout in found} == {1, 2, 4}  # 8 replicas have no whole row each
    assert {layout.grid.tp for layout in found} == {1, 2, 4, 8} and {layout.grid.cp for layout in found} == {1}
    ways = [(layout.config.parallel, layout.step.time) for layout in found]
    kinds = ("none", "optimizer", "optimizer+parameters")
    times = [(kinds.index(parallel.offload), parallel.fully_sharded, time) for parallel, time in ways]
    assert times == sorted(times) and len({way[:2] for way in times}) == 5  # the host comes last
    grown = candidates(case.config(), case.model_config, 8, lambda dp: replace(case, microbatches=4 * dp).config())
    assert {layout.grid.dp for layout in grown} == {1, 2, 4, 8} and {layout.step.microbatches for layout in grown} == {
        4
    }


def test_stages_are_balanced_and_what_was_asked_for_stays():
    case = make_case(microbatches=8, row=RowShape(segments=(256,), images=((3, 112, 112),) * 15))
    found = candidates(case.config(), case.model_config, 2, row=case.row)
    piped = next(layout for layout in found if layout.grid.pp == 2)
    assert piped.config.parallel.decoder_layers_per_stage == piped.step.layers and sum(piped.step.layers) == 4
    assert piped.step.layers[0] < piped.step.layers[1]  # the tower is on the first
    asked = case.config()
    asked = replace(asked, parallel=asked.parallel.replace(recompute_granularity="full", vision_parallel="tensor"))
    for layout in candidates(asked, case.model_config, 2, row=case.row):
        assert layout.config.parallel.recompute_granularity == "full" and ", recomputing" in layout.name
        assert layout.config.parallel.vision_parallel == "tensor"


def test_images_ahead_leave_grids_without_stages():
    """Weights in shards do not go with them: that way is left out, not the grids."""
    case, left_out = make_case(parallel=dict(vision_parallel="ahead", tensor_model_parallel_size=2)), {}
    found = candidates(case.config(), case.model_config, 4, row=case.row, left_out=left_out)
    assert {layout.grid for layout in found} >= {Grid(tp=2, dp=2), Grid(pp=2, dp=2), Grid(tp=4)}
    assert not any(layout.config.parallel.fully_sharded for layout in found)
    assert list(left_out) == [Grid(dp=4).name()] and "no effect on one rank" in left_out[Grid(dp=4).name()]


def test_what_stays_between_steps_is_asked_for_each_way_of_images(monkeypatch):
    """With recomputation images are encoded ahead, copies of the tower on later stages: layers are as without."""
    asked, case = set(), make_case("idefics2")

    def too_large(run, *unused, trace, **more):
        asked.add((run.parallel.pipeline_model_parallel_size, run.parallel.vision_parallel, trace))
        sizes = dict.fromkeys(("gradients", "optimizer", "activations", "temporary", "constant"), 0)
        return [StageMemory(stage=0, ranks=(0, 0), parameters={}, trainable={}, weights=1 << 40, **sizes)]

    monkeypatch.setattr(balance, "_HELPS", 10.0)
    monkeypatch.setattr(balance, "_LONG", 0.0)
    monkeypatch.setattr(layout_module, "_memory", lambda: SimpleNamespace(estimate=too_large))
    with pytest.raises(NothingFits):
        choose_layout(case.config(), registry.get("idefics2"), case.model_config, 2, 1 << 20, row=case.row)
    assert {(2, "auto", False), (2, "ahead", False)} <= asked


def test_long_rows_are_split_over_ranks():
    """Few rows of many tokens: ranks that share one keep fewer activations, and need not wait as a pipeline's do."""
    family, model_config = shapes.published()["InternVL3-8B"]
    row = RowShape(segments=(65536,))
    case = Case(name="", family=family, model_config=model_config, row=row, microbatches=2)
    found = candidates(case.config(), model_config, 8, row=row)
    assert {layout.grid.cp for layout in found} == {1, 2, 4, 8}
    order = [layout.name for layout in found if not layout.config.parallel.recompute_granularity]
    assert order.index("cp 4 dp 2") < order.index("tp 4 dp 2") < order.index("pp 4 dp 2")
    short = replace(case, row=RowShape(segments=(4096,)))
    assert {layout.grid.cp for layout in candidates(short.config(), model_config, 8, row=short.row)} == {1}


def test_larger_microbatches_come_first():
    config = make_case(microbatches=8).config()
    config = replace(config, data=replace(config.data, packing=False))
    found = candidates(config, make_case().model_config, 2, micro_batch_sizes=(4, 2, 1, 3))
    plain = [
        x
        for x in found
        if x.name.startswith("dp 2")
        and "recomputing" not in x.name
        and "host" not in x.name
        and "sharded" not in x.name
    ]
    assert [layout.config.training.micro_batch_size for layout in plain] == [4, 2, 1]
    assert found[0].config.training.micro_batch_size == 4 and found[0].step.microbatches == 1


def published(name: str, gpus: int, gib: int, peft: dict) -> Layout:
    family, model_config = shapes.published()[name]
    case = Case(
        name=name, family=family, model_config=model_config, row=RowShape(segments=(4096,)), microbatches=64, peft=peft
    )
    return choose_layout(case.config(), registry.get(family), model_config, gpus, gib * GIB)


@pytest.mark.full
@pytest.mark.parametrize("name", ["Idefics2-8B", "InternVL3-8B", "LLaVA-InternLM2-7B"])
@pytest.mark.parametrize(
    ("gpus", "gib", "peft"),
    [(8, 80, FULL), (1, 80, FULL), (2, 80, FULL), (2, 48, FULL), (1, 80, QLORA), (2, 48, QLORA)],
)
def test_models_of_8b(name, gpus, gib, peft):
    layout = run_alone(published, name, gpus, gib, peft, timeout=900)
    print(f"{name} on {gpus} x {gib} GB: {layout.reason}")
    assert layout.need <= USABLE * gib * GIB and layout.grid.world == gpus
