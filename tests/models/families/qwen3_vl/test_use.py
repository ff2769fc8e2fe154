"""Qwen3-VL in use: adapters equal PEFT's and train alike in layouts, also on 4 bits."""

import pytest

from megatron_vlm import registry
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.layouts import Case, LayoutCheck
from megatron_vlm.testing.parity import adapted_mapping, gradient_errors, layout_run, merge_gradients
from megatron_vlm.testing.twins.peft import peft_gradients, peft_twin
from megatron_vlm.testing.twins.qwen2_5_vl import inputs_of, make_samples
from megatron_vlm.testing.twins.qwen3_vl import write_tiny_qwen3_vl

LORA = dict(
    target_modules="all-linear",
    modules_to_save=("merger", "deepstack_merger_list.0", "deepstack_merger_list.1"),
    r=3,
    alpha=6,
)
FOUR_BITS = {"quantize": "nf4", "quantize_groups": ("llm", "vision")}
ROWS = [[([], 23)], [([(3, 4)], 14), ([], 9)], [([(1, 2), (4, 3), (2, 2)], 7)], [([], 17)]]


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """Folder, config.json, and of pairs on every linear, with mergers that train in full: PEFT's model and its tensors."""
    folder = str(tmp_path_factory.mktemp("twin"))
    hf = write_tiny_qwen3_vl(folder)
    hf_config = hf.config.to_dict()
    return folder, hf_config, *peft_twin(hf, LORA)


def test_adapters_equal_peft(twin):
    folder, hf_config, model, tensors = twin
    with open_source(folder) as source:
        samples = make_samples(source.config, [([(3, 4)], 14), ([], 23)])
        loss, _, grads = peft_gradients(model, samples, inputs_of(hf_config))
        results = run_distributed(
            layout_run, folder, [row_from_samples(samples)], {}, {}, 0, 1e-3, {"tensors": tensors, **LORA}
        )
        mapping = adapted_mapping(source, LORA, 1)
        our_loss, our_grads = merge_gradients(results, mapping, source.config.text.vocab_size)
    errors = gradient_errors({mapping.module_name(name): grad for name, grad in our_grads.items()}, grads)
    worst = max((error, name) for name, error in errors.items())
    print(f"loss {abs(our_loss - loss) / loss:.1e}, worst gradient {worst[0]:.1e} {worst[1]}")
    assert abs(our_loss - loss) <= 2e-6 * loss and worst[0] <= 1e-4
    assert any("visual.blocks.0.attn.qkv" in name for name in errors) and any(
        "merger_list.1.linear_fc1" in n for n in errors
    )


@pytest.mark.parametrize(
    ("case", "more"),
    [
        (Case(pp=2, layers=(1, 3), updates=2), FOUR_BITS),
        pytest.param(Case(tp=2, cp=2, vision="share", updates=2), FOUR_BITS, marks=pytest.mark.full),
        pytest.param(Case(tp=2, pp=2, sp=True, updates=2), {}, marks=pytest.mark.full),
        pytest.param(Case(tp=2, pp=2, sp=True, updates=2), FOUR_BITS, marks=pytest.mark.full),
        pytest.param(Case(cp=2, dp=2, do=True, recompute=True), {}, marks=pytest.mark.full),
        pytest.param(Case(pp=2, cp=2, vision="ahead", updates=2), FOUR_BITS, marks=pytest.mark.full),
    ],
    ids=lambda value: "nf4" if value == FOUR_BITS else "lora" if value == {} else str(value),
)
def test_adapters_train_alike_in_layouts(twin, case, more):
    folder, hf_config, _, tensors = twin
    config = registry.get("qwen3_vl").config(hf_config)
    LayoutCheck(
        family="qwen3_vl",
        directory=folder,
        hf_config=hf_config,
        batches=[make_samples(config, row, seed=i) for i, row in enumerate(ROWS)],
        fill=64,
        peft={"tensors": tensors, **LORA, **more},
    ).check(case)
