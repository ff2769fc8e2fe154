"""Rows without images: every parameter is reached in the order of a row with images, and no number comes of it."""

import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import build_for_test
from megatron_vlm.testing.twins.small_families import NAMES, write_small_twin

WITH_IMAGES = [[(1, 9), (0, 4)], [(2, 7)], [(1, 5), (1, 5), (1, 3)]]
WITHOUT = [[(0, 11)], [(0, 5), (0, 6)], []]  # the last is a row of which every sample was a hole
VISION = ("vision_model", "connector")
LORA = dict(
    target_modules=r".*(_proj|fc1|fc2|wqkv|wo|w1|w2|w3|linear_1|linear_2|attn\.qkv|vision_proj\.0)",
    r=2,
    alpha=4,
    dropout=0.3,
)
VARIANTS = {
    "plain": ({}, None),
    "recompute": ({"recompute_granularity": "full"}, None),
    "frozen tower": ({"freeze": ("vision",)}, None),
    "frozen connector": ({"freeze": ("connector",), "recompute_granularity": "full"}, None),
    "frozen decoder": ({"freeze": ("llm",)}, None),
    "bf16": ({"params_dtype": "bf16"}, None),
    "lora": ({}, LORA),
    "nf4": ({}, {**LORA, "quantize": "nf4", "quantize_groups": ("llm", *("vision", "connector"))}),
    "nf4 recompute": ({"recompute_granularity": "full"}, {**LORA, "quantize": "nf4", "quantize_groups": ("vision",)}),
    "drop path": ({"drop_path_rate": 0.5}, None),
    "drop path recompute": ({"drop_path_rate": 0.5, "recompute_granularity": "full"}, None),
}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            made[name] = write_small_twin(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


def visits(directory, rows, options, peft):
    """On a rank, of each row: (names in the order of their gradients, those among them not zero, generators as before, loss)."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_vlm.models.built import global_parameters

    recompute = options.get("recompute_granularity")
    options = {key: value for key, value in options.items() if key != "recompute_granularity"}
    peft = peft and {"tensors": {}, **peft}
    _, _, (model,), _ = build_for_test(directory, {"recompute_granularity": recompute}, options, peft)
    model.train()
    order = []
    parameters = global_parameters([model])
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: order.append(name))
    found = []
    for row in rows:
        order.clear()
        for parameter in parameters.values():
            parameter.grad = None
        states = torch.get_rng_state(), dict(get_cuda_rng_tracker().get_states())
        loss = model(row)
        loss.backward()
        tracker = get_cuda_rng_tracker().get_states()
        same = torch.equal(states[0], torch.get_rng_state()) and all(
            torch.equal(states[1][n], tracker[n]) for n in tracker
        )
        moved = {n for n, p in parameters.items() if p.grad is not None and not (p.grad == 0).all()}
        found.append((list(order), moved, same, float(loss.detach())))
    return found


SLOW = (
    "smolvlm",
    "qwen2_5_vl",
    "xcomposer2_hd",
    "llava_internlm2",
    "llava_onevision",
)  # of parts that others have, too


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.full if name in SLOW else ()) for name in NAMES if name != "internlm2"],
)
def test_gradients_come_in_the_same_order_with_and_without_images(twins, name):
    twin = twins(name)
    rows = [twin.row(specs, seed=i) for i, specs in enumerate([*WITH_IMAGES, *WITHOUT])]
    for variant, (options, peft) in VARIANTS.items():
        if "drop_path_rate" in options and not registry.get(twin.family).drop_path:
            continue
        (found,) = run_distributed(visits, twin.directory, rows, options, peft)
        orders = [order for order, *_ in found]
        first = orders[0]
        assert len(first) == len(set(first)) > 8, variant
        assert any(n.startswith(VISION) for n in first), variant
        for order in orders[1:]:
            assert order == first, variant
        for _, moved, _, _ in found[: len(WITH_IMAGES)]:
            assert any(n.startswith(VISION) for n in moved), variant
        for _, moved, _, _ in found[len(WITH_IMAGES) :]:
            assert not any(n.startswith(VISION) or ".plora." in n for n in moved), variant
        for _, moved, _, _ in found[len(WITH_IMAGES) : -1]:
            assert moved or "llm" in options.get("freeze", ()), variant


def test_filler_leaves_every_generator_as_it_was(twins):
    """Drop path of the tower, dropout of its pairs: a row of text draws what its decoder draws, and nothing for filler."""
    twin = twins("internvl3")
    rows = [twin.row(specs, seed=7) for specs in ([(1, 9)], [(0, 11)], [])]
    tower = dict(target_modules=r".*vision_tower.*(_proj|fc1|fc2|projection_layer)", r=2, alpha=4, dropout=0.3)
    for options, peft in (({}, None), ({}, tower), ({"recompute_granularity": "full"}, tower)):
        (found,) = run_distributed(visits, twin.directory, rows, {"drop_path_rate": 0.5, **options}, peft)
        assert [same for _, _, same, _ in found] == [False, True, True]
        assert {name.split(".")[0] for name in found[1][0]} >= {"vision_model"}


def after_a_step(directory, row, freeze, recompute):
    """On a rank: the generators after a row of text that went forth and back in training, and its loss."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    parallel = {"recompute_granularity": "full" if recompute else None}
    _, _, (model,), _ = build_for_test(directory, parallel, {"freeze": freeze})
    model.train()
    loss = model(row)
    loss.backward()
    return torch.get_rng_state(), get_cuda_rng_tracker().get_states(), float(loss.detach())


def test_a_row_of_text_draws_the_same_with_and_without_filler(twins):
    """Dropout of the branches of image tokens is drawn in training in any case, recomputed or not."""
    twin = twins("xcomposer2")
    row = twin.row([(0, 11)])
    (first,) = run_distributed(after_a_step, twin.directory, row, (), False)
    for freeze, recompute in ((("vision", "connector"), False), ((), True), (("vision", "connector"), True)):
        ((default, tracker, loss),) = run_distributed(after_a_step, twin.directory, row, freeze, recompute)
        assert torch.equal(default, first[0]) and loss == first[2], (freeze, recompute)
        assert all(torch.equal(tracker[name], state) for name, state in first[1].items()), (freeze, recompute)


def with_a_spoilt_part(directory, rows, spoilt, value, dtype, recompute):
    """On a rank: loss and gradients of each row, before and after what filler runs through overflows."""
    from megatron_vlm.models.built import global_parameters

    parallel = {"recompute_granularity": "full" if recompute else None}
    _, _, (model,), _ = build_for_test(directory, parallel, {"params_dtype": dtype})
    model.train()
    parameters = global_parameters([model])
    found = []
    for change in (None, value):
        if change is not None:
            parameters[spoilt].data.fill_(change)
        for row in rows:
            model.zero_grad()
            loss = model(row)
            loss.backward()
            found.append((float(loss.detach()), {n: p.grad.clone() for n, p in parameters.items() if p.requires_grad}))
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("name", "spoilt"),
    [
        ("idefics2", "vision_model.patch_embedding.bias"),
        ("idefics2", "connector.perceiver_resampler.norm.weight"),
        ("internvl3", "vision_model.encoder.layers.0.mlp.linear_fc1.bias"),
        ("llava_internlm2", "connector.mlp.linear_fc2.bias"),
        ("xcomposer2_hd", "vision_model.class_embedding"),
        ("xcomposer2", "language_model.decoder.layers.1.self_attention.linear_qkv.plora.a"),
        ("xcomposer2", "language_model.decoder.layers.2.mlp.linear_fc2.plora.a"),
    ],
)
def test_filler_that_overflows_reaches_neither_loss_nor_gradients(twins, name, spoilt, dtype):
    """Zero times infinity is nan: the row's loss and gradients are those before, and tower and connector get exact zeros."""
    twin = twins(name)
    rows = [twin.row([(0, 11)], seed=3)]
    value, recompute = float("inf"), dtype == "bf16"
    if "plora" in spoilt:  # a branch of image tokens: its product with the inputs overflows
        value = torch.finfo({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]).max
    (found,) = run_distributed(with_a_spoilt_part, twin.directory, rows, spoilt, value, dtype, recompute)
    (loss, grads), (spoilt_loss, spoilt_grads) = found
    assert spoilt_loss == loss > 0
    for parameter, grad in spoilt_grads.items():
        assert torch.equal(grad, grads[parameter]), parameter
        if parameter.startswith(VISION):
            assert not grad.any() and not grad.isnan().any(), parameter


def test_what_overflows_in_an_image_is_not_hidden(twins):
    """A row with images after one without: its gradients are its own again."""
    twin = twins("idefics2")
    rows = [twin.row([(0, 11)]), twin.row([(1, 9)])]
    spoilt = "vision_model.patch_embedding.bias"
    (found,) = run_distributed(with_a_spoilt_part, twin.directory, rows, spoilt, float("inf"), "fp32", False)
    sound, broken = found[1][1], found[3][1]
    assert sound[spoilt].any() and not sound[spoilt].isnan().any()
    assert broken[spoilt].isnan().any()


def runs_of_the_tower(directory, rows, freeze):
    """On a rank, of each row: images that the tower ran on in training, in training without gradients, and in evaluation."""
    _, _, (model,), _ = build_for_test(directory, {}, {"freeze": freeze})
    seen = []
    model.vision_model.register_forward_pre_hook(lambda _, inputs: seen.append([tuple(p.shape) for p in inputs[0]]))
    found = []
    for row in rows:
        batch = row
        seen.clear()
        model.train()
        model(batch)
        trained = list(seen)
        seen.clear()
        model.eval()
        with torch.no_grad():
            model(batch)
        found.append((trained, list(seen)))
    return found


@pytest.mark.parametrize(
    ("name", "patches"), [("idefics2", 1), ("internvl3", 2), ("xcomposer2", 1), ("xcomposer2_hd", 2)]
)
def test_filler_is_the_smallest_image_and_only_where_something_trains(twins, name, patches):
    twin = twins(name)
    text, side = twin.row([(0, 11)]), patches * twin.config.vision.patch_size
    for freeze in ((), ("vision",), ("connector", "llm")):
        ((trained, evaluated),) = run_distributed(runs_of_the_tower, twin.directory, [text], freeze)[0]
        assert trained == [[(3, side, side)]] and evaluated == []
    ((trained, evaluated),) = run_distributed(runs_of_the_tower, twin.directory, [text], ("vision", "connector"))[0]
    assert trained == [] and evaluated == []
