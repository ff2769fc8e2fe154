"""Gemma 3 in use: answers equal transformers', adapters equal PEFT's and train alike in layouts, also on 4 bits."""

import json

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from megatron_vlm import registry
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.data.sample import Turn
from megatron_vlm.models.families.gemma3.processor import Gemma3Processor
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.layouts import Case, LayoutCheck
from megatron_vlm.testing.parity import layout_answers, layout_logits
from megatron_vlm.testing.twins.gemma3 import hf_inputs, make_samples, write_tiny_gemma3
from megatron_vlm.testing.twins.peft import peft_gradients, peft_twin

NEW = 10
LORA = dict(target_modules="all-linear", r=3, alpha=6)
LOGITS = 1e-5  # of the largest logit


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twin")
    return str(folder), write_tiny_gemma3(folder)


def test_greedy_answers_equal_transformers(twin):
    """Prompts without, with one and with two images, longer than the window: a prefill both ways, then token by token."""
    folder, model = twin
    processor = Gemma3Processor.from_pretrained(folder, DataConfig(seq_length=1024))
    china = Image.fromarray(load_sample_image("china.jpg"))
    images = [china.resize((90, 50)), china.resize((10, 64))]
    texts = ["How many cats?", "<image>What digit is this?", "<image> and <image>: the same?"]
    prompts = [processor.encode_prompt([Turn(role="user", text=t)], images[: t.count("<image>")]) for t in texts]
    sampling, expected = dict(max_new_tokens=NEW, batch_size=2), []
    for prompt in prompts:
        options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=list(processor.stop_ids))
        new = model.generate(**hf_inputs(prompt), **options)[0, len(prompt.input_ids) :].tolist()
        expected.append(tuple(i for i in new if i not in processor.stop_ids))
    assert any(len(ids) == NEW for ids in expected)
    for tp, pp in ((1, 1), (2, 2)):
        parallel = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
        (rank, *_) = run_distributed(
            layout_answers, folder, prompts, [parallel], sampling, processor.stop_ids, tp=tp, pp=pp
        )
        assert [answer.ids for answer in rank[0]] == expected


@pytest.fixture(scope="module")
def adapters(twin):
    """Samples, PEFT's model and its tensors: pairs on every linear of tower and decoder."""
    folder, hf = twin
    with open_source(folder) as source:
        samples = make_samples(source.config, [(2, 14), (0, 20)])
    model, tensors = peft_twin(hf, LORA)
    return samples, model, tensors


def test_adapters_equal_peft(twin, adapters):
    folder, _ = twin
    samples, model, tensors = adapters
    _, logits, _ = peft_gradients(model, samples, hf_inputs)
    rows = [row_from_samples(samples)]
    parallel, peft = {"tensor_model_parallel_size": 2}, {"tensors": tensors, **LORA}
    ours, *_ = run_distributed(layout_logits, folder, rows, parallel, {}, peft, tp=2)
    assert float((ours["logits"][0] - logits).abs().max()) <= LOGITS * float(logits.abs().max())


CASES = [Case(tp=2, pp=2, sp=True, updates=2), Case(tp=2, cp=2, vision="share", updates=2)]
MORE = [Case(cp=2, dp=2, do=True), Case(pp=2, dp=2, vp=1, overlap=True), Case(dp=4, shard="parameters", recompute=True)]
FOUR_BITS = {"quantize": "nf4", "quantize_groups": ("vision", "llm")}


@pytest.mark.parametrize(
    ("case", "more"),
    [
        *(pytest.param(case, more, marks=pytest.mark.full) for case in MORE for more in ({}, FOUR_BITS)),
        *(
            pytest.param(case, more, marks=pytest.mark.full)
            for case, more in ((CASES[0], {}), (CASES[0], FOUR_BITS), (CASES[1], {}), (CASES[1], FOUR_BITS))
        ),
    ],
    ids=lambda value: "nf4" if value == FOUR_BITS else "lora" if value == {} else str(value),
)
def test_adapters_train_alike_in_layouts(twin, adapters, case, more):
    folder, hf = twin
    hf_config = hf.config.to_dict()
    config = registry.get("gemma3").config(json.loads(json.dumps(hf_config)))
    rows = [[(0, 23)], [(2, 14), (0, 9)], [(3, 7)], [(0, 17)]]
    check = LayoutCheck(
        family="gemma3",
        directory=folder,
        hf_config=hf_config,
        batches=[make_samples(config, row, seed=i) for i, row in enumerate(rows)],
        fill=64,
        peft={"tensors": adapters[2], **LORA, **more},
    )
    check.check(case)
    assert torch.isfinite(torch.tensor(check.alone(())[0]))
