"""Models over context parallel ranks: rows of every make, drop path, and mistakes made on purpose, each of which is caught.

The layouts of each family are in its own tests (testing/layouts.py).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.testing.distributed import RankError
from megatron_vlm.testing.layouts import Case, LayoutCheck, idefics2_check
from megatron_vlm.testing.parity import layout_run, random_samples
from megatron_vlm.testing.twins.internvl3 import make_samples as internvl3_samples
from megatron_vlm.testing.twins.internvl3 import write_tiny_internvl3
from megatron_vlm.testing.twins.xcomposer2 import make_samples as xcomposer2_samples
from megatron_vlm.testing.twins.xcomposer2 import write_tiny_xcomposer2

ROWS = {
    "a rank without an image": [[([(40, 50)], 3), ([], 60)], [([], 30)], [([(16, 16)], 2), ([], 9)], [([], 3)]],
    "all images on one rank": [[([], 50), ([(24, 48), (16, 16), (40, 50)], 3)]] * 4,
    "an image is half the row": [[([(24, 48)], 5)]] * 4,
    "filler alone": [[([(24, 48)], 5)], [], [([], 9)], []],
    "one token": [[([], 1)], [([(16, 16)], 1)], [([], 2), ([], 1)], [([], 3)]],
}


@pytest.fixture(scope="module")
def idefics2(tmp_path_factory):
    return idefics2_check(tmp_path_factory.mktemp("twin"), rows=[], fill=96, sliding_window=11)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("one token", "filler alone") else pytest.mark.full) for name in ROWS],
)
def test_rows_of_every_make(idefics2, name):
    batches = [random_samples(idefics2.config, specs, seed=i) for i, specs in enumerate(ROWS[name])]
    check = dataclasses.replace(idefics2, batches=batches, _alone={})
    check.check(Case(cp=4, updates=2))
    check.check(Case(cp=2, exchange="heads", dp=2, overlap=True, updates=2))


@pytest.fixture(scope="module")
def xcomposer2(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("xcomposer2"))
    hf_config = write_tiny_xcomposer2(directory, variant="7b")
    rows: list[Any] = [[([], 23)], [([(1, 1)], 14), ([], 9)], [([(1, 1), (1, 1)], 7)], [([], 17)]]
    return LayoutCheck(
        family="xcomposer2",
        directory=directory,
        hf_config=hf_config,
        batches=[xcomposer2_samples(hf_config, row, seed=i) for i, row in enumerate(rows)],
        fill=64,
        no_true_gradient=lambda name: name.startswith("vit.") and name.endswith("k_proj.bias"),
    )


def count_whole_rows(patch: Any) -> None:
    """The supervised tokens of the whole row are counted by each context parallel rank: half the gradients at cp 2."""
    from megatron_vlm.training import step

    right = step._loss
    patch.setattr(step, "_loss", lambda row, loss: (right(row, loss)[0], 2 * right(row, loss)[1], right(row, loss)[2]))


def let_rope_cut(patch: Any) -> None:
    """megatron-core's layers know the context parallel group: its RoPE cuts angles that are this rank's already."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_vlm.models import language

    patch.setattr(language, "process_groups", lambda solo=False: ProcessGroupCollection.use_mpu_process_groups())


def mask_by_positions_of_the_row(patch: Any) -> None:
    """Partial LoRA is told where images are in the whole row: branches act on other tokens."""
    from megatron_vlm.layers.core_attention import RowParams

    def wrong(row: RowParams) -> torch.Tensor:
        mask = torch.ones(int(row.cu_seqlens_q_padded[1]), 1, 1, dtype=torch.bool)
        assert row.image_positions is not None and row.deal is not None
        held = row.deal.index[row.image_positions]
        return mask.index_fill_(0, held[held < len(mask)], False)

    patch.setattr(RowParams, "text_mask", property(wrong))


def seed_each_pass(patch: Any) -> None:
    """As the trainer does it before each step; no mistake."""
    from megatron_vlm.parallel.rng import seed_step
    from megatron_vlm.testing import parity
    from megatron_vlm.training import step

    right = step.run_schedule

    def seeded(model: Any, rows: Any, **options: Any) -> Any:
        seed_step(model.topology, 0, 0)
        return right(model, rows, **options)

    for module in (step, parity):
        patch.setattr(module, "run_schedule", seeded)


def draw_apart(patch: Any) -> None:
    """Every context parallel rank leaves out other tiles of the images that all of them encode."""
    from contextlib import nullcontext

    from megatron_vlm.models import vlm

    seed_each_pass(patch)
    patch.setattr(vlm, "alike_over_context_ranks", nullcontext)


def run_with(mistake: str, *args: Any) -> Any:
    """``layout_run`` with one of the changes above."""
    with pytest.MonkeyPatch.context() as patch:
        globals()[mistake](patch)
        return layout_run(*args)


def wrong_count(*args: Any) -> Any:
    return run_with("count_whole_rows", *args)


def wrong_rope(*args: Any) -> Any:
    return run_with("let_rope_cut", *args)


def wrong_mask(*args: Any) -> Any:
    return run_with("mask_by_positions_of_the_row", *args)


def seeded(*args: Any) -> Any:
    return run_with("seed_each_pass", *args)


def wrong_draws(*args: Any) -> Any:
    return run_with("draw_apart", *args)


@pytest.mark.parametrize("run", [wrong_count, wrong_rope, wrong_mask], ids=lambda run: run.__name__)
def test_a_mistake_is_caught(xcomposer2, run):
    xcomposer2.alone(())
    with pytest.raises((AssertionError, RankError), match=r"tp1pp1dp1cp2: |to sum exactly to"):
        dataclasses.replace(xcomposer2, run=run).check(Case(cp=2, updates=1))


def test_drop_path_leaves_out_the_same_on_every_rank(tmp_path):
    hf_config = write_tiny_internvl3(tmp_path).config.to_dict()
    config = registry.get("internvl3").config(hf_config)
    rows: Sequence[Any] = [[([2], 23)], [([1], 14), ([], 9)], [([3, 1], 7)], [([], 17)]]
    check = LayoutCheck(
        family="internvl3",
        directory=str(tmp_path),
        hf_config=hf_config,
        batches=[internvl3_samples(config, row, seed=i) for i, row in enumerate(rows)],
        no_true_gradient=lambda name: name.startswith("vision_tower") and name.endswith("k_proj.bias"),
        fill=64,
        options={"drop_path_rate": 0.5},
        run=seeded,
    )
    check.check(Case(cp=2, vision="tensor", recompute=True, updates=1))
    with pytest.raises(AssertionError, match="cp2-tensor: "):
        dataclasses.replace(check, run=wrong_draws).check(Case(cp=2, vision="tensor", updates=1))


def count_images(*args: Any) -> Any:
    """``layout_run``; beside what it gives, the images that this rank encoded, and the numbers of pixels that it received."""
    from megatron_vlm.models.vlm import VisionLanguageModel
    from megatron_vlm.parallel import batch as batch_module

    images, pixels = [], []
    encode, send = VisionLanguageModel._shared_features, batch_module.send_images

    def encoded(self: Any, batch: Any) -> Any:
        images.append(len(batch.pixels))
        return encode(self, batch)

    def sent(*args: Any) -> Any:
        received = send(*args)
        pixels.append(sum(image.numel() for image in received))
        return received

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionLanguageModel, "_shared_features", encoded)
        patch.setattr(batch_module, "send_images", sent)
        return {**layout_run(*args), "images": images, "pixels": pixels}


@pytest.mark.parametrize("case", [Case(cp=4, updates=0), Case(tp=2, cp=2, updates=0)], ids=str)
def test_each_image_is_encoded_once_and_its_pixels_sent_once(idefics2, case):
    batches = [random_samples(idefics2.config, specs, seed=i) for i, specs in enumerate(ROWS["all images on one rank"])]
    *_, results = dataclasses.replace(idefics2, batches=batches, run=count_images, _alone={})._run(case)
    ranks = [result for result in results if result["tp_rank"] == 0]
    assert [sum(row) for row in zip(*(result["images"] for result in ranks))] == [3] * 4
    expected = [sum(image.numel() for sample in row for image in sample.pixels) for row in batches]
    assert [sum(row) for row in zip(*(result["pixels"] for result in ranks))] == expected
    assert max(max(result["images"]) for result in ranks) == (1 if case.cp == 4 else 2)


@pytest.mark.parametrize("freeze", [("vision",), ("vision", "connector"), ("llm",)])
def test_shared_images_with_frozen_parts(idefics2, freeze):
    batches = [
        random_samples(idefics2.config, specs, seed=i) for i, specs in enumerate(ROWS["a rank without an image"])
    ]
    check = dataclasses.replace(idefics2, batches=batches, _alone={})
    check.check(Case(cp=2, dp=2, freeze=freeze, overlap=True, updates=1))
