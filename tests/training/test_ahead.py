"""Images of a step encoded before its schedule train as one process does, each once; a mistake is caught."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vlm.data.row import row_from_samples
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.layouts import IDEFICS2_ROWS, Case, idefics2_check
from megatron_vlm.testing.parity import build_for_test, layout_gradients, layout_run, random_samples
from megatron_vlm.testing.twins.internvl3 import write_tiny_internvl3
from megatron_vlm.training.ahead import cut_passes

CASES = [
    Case(pp=2, cp=2, vision="ahead", recompute=True, updates=2),
    Case(tp=2, pp=2, sp=True, vp=1, vision="ahead", updates=2),
    Case(pp=2, dp=2, do=True, overlap=True, vision="ahead", freeze=("connector",), updates=2),
    Case(tp=2, dp=2, sp=True, do=True, overlap=True, vision="share", updates=2),
]
MORE = [
    *(Case(tp=tp, cp=cp, sp=tp > 1, vision="share", overlap=True) for tp, cp in ((2, 1), (4, 1), (2, 2))),
    *(
        Case(pp=2, vp=vp, vision="ahead", freeze=freeze, recompute=recompute, do=True)
        for vp in (None, 1)
        for recompute in (False, True)
        for freeze in ((), ("vision",), ("vision", "connector"), ("llm",))
    ),
    Case(pp=4, vision="ahead", layers=(0, 2, 1, 1)),
    Case(tp=2, cp=2, vision="ahead", freeze=("llm",), recompute=True),
    Case(tp=2, pp=2, sp=True, vision="ahead", freeze=("vision",), recompute=True),
    Case(tp=2, dp=2, vision="ahead", do=True, overlap=True),
    Case(pp=2, cp=2, vp=1, vision="ahead", recompute=True),
]


@pytest.fixture(scope="module")
def idefics2(tmp_path_factory):
    return idefics2_check(tmp_path_factory.mktemp("twin"), sliding_window=11)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_trains_as_one_process(idefics2, case):
    idefics2.check(case)


@pytest.mark.full
@pytest.mark.parametrize("case", MORE, ids=str)
def test_more_layouts(idefics2, case):
    idefics2.check(case)


@pytest.mark.parametrize("images", ["none", pytest.param("of one replica", marks=pytest.mark.full)])
def test_steps_and_replicas_without_images(idefics2, images):
    specs: list[Any] = [IDEFICS2_ROWS[2] if images != "none" and i % 2 == 0 else [([], 9 + i)] for i in range(4)]
    batches = [random_samples(idefics2.config, row, seed=i) for i, row in enumerate(specs)]
    check = dataclasses.replace(idefics2, batches=batches, _alone={})
    check.check(Case(pp=2, dp=2, do=True, overlap=True, vision="ahead", updates=2))


def test_gradients_are_scaled_in_fp16(idefics2):
    rows = [row_from_samples(samples) for samples in idefics2.batches]
    parallel = Case(pp=2, vision="ahead").parallel
    half, single = (
        run_distributed(layout_gradients, idefics2.directory, [rows], parallel, dict(params_dtype=dtype), pp=2)[0][0]
        for dtype in ("fp16", "fp32")
    )
    for name in ("vision_model.patch_embedding.weight", "connector.perceiver_resampler.latents"):
        wanted = 256 * single["grads"][name]
        assert float((half["grads"][name] - wanted).norm()) < 0.03 * float(wanted.norm())


def encoded_twice(directory: str, parallel: dict) -> list[Tensor]:
    """On a rank: features of the same image, twice, by a tower that leaves out most of its updates at random."""
    *_, model, _ = build_for_test(directory, parallel, {"drop_path_rate": 0.9})
    stage = model.stages[0]
    stage.train()
    pixels = torch.ones(3, stage.vision_model.patch_size * 8, stage.vision_model.patch_size * 8)
    with torch.no_grad():
        return [stage.own_features([pixels] * 8) for _ in range(2)]


def test_ranks_leave_out_other_images(tmp_path):
    write_tiny_internvl3(tmp_path)
    for way in ("share", "ahead"):
        parallel = Case(tp=2, vision=way).parallel
        (a, b), (c, d) = run_distributed(encoded_twice, str(tmp_path), parallel, tp=2)
        assert not any(torch.equal(one, other) for one, other in ((a, b), (a, c), (b, d)))


def sum_over_tp(*args: Any) -> Any:
    """``layout_run`` with the mistake: gradients of features, alike on all tensor parallel ranks, are summed over them."""
    from megatron.core import parallel_state

    from megatron_vlm.layers.context.images import Route

    right = Route.carry

    def wrong(self: Any, x: Any, group: Any) -> Any:
        calls.append(len(x))
        if len(calls) % 2 == 0:  # the way back
            x = x.clone()
            dist.all_reduce(x, group=parallel_state.get_tensor_model_parallel_group())
        return right(self, x, group)

    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Route, "carry", wrong)
        return layout_run(*args)


def test_a_sum_over_tensor_parallel_ranks_is_caught(idefics2):
    with pytest.raises(AssertionError, match=r"gradient=1\.0.*(vision_model|connector)"):
        dataclasses.replace(idefics2, run=sum_over_tp).check(Case(tp=2, pp=2, vision="ahead", updates=1))


def count_images(*args: Any) -> Any:
    """``layout_run``; beside what it gives, numbers of pixels of each image that this rank received, and that it encoded."""
    from megatron_vlm.models.vlm import VisionLanguageModel
    from megatron_vlm.training import ahead

    received, encoded = [], []
    send, encode = ahead.send_images, VisionLanguageModel.own_features

    def sent(*args: Any) -> Any:
        images = send(*args)
        received.extend(image.numel() for image in images)
        return images

    def counted(self: Any, pixels: Any, *grids: Any) -> Any:
        encoded.extend(image.numel() for image in pixels)
        return encode(self, pixels, *grids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "send_images", sent)
        patch.setattr(VisionLanguageModel, "own_features", counted)
        return {**layout_run(*args), "received": received, "encoded": encoded}


@pytest.mark.parametrize("case", [Case(tp=2, pp=2, vision="ahead"), Case(pp=2, cp=2, vision="ahead")], ids=str)
def test_each_image_is_encoded_once_and_its_pixels_sent_once(idefics2, case):
    *_, results = dataclasses.replace(idefics2, run=count_images)._run(dataclasses.replace(case, updates=0))
    images = sorted(image.numel() for row in idefics2.batches for sample in row for image in sample.pixels)
    for what in ("received", "encoded"):
        assert sorted(number for result in results for number in result[what]) == images
    assert max(len(result["encoded"]) for result in results) == 1 and len(images) == 3


def test_passes_hold_about_what_a_row_has():
    assert cut_passes([0, 2, 3, 5], [1.0, 9.0, 1.0, 1.0, 9.0, 3.0], 3.0) == [[0, 2, 3], [5]]
    assert cut_passes([1, 4], [1.0, 9.0, 1.0, 1.0, 9.0], 3.0) == [[1], [4]]
    assert cut_passes([], [], 3.0) == []
