"""LLaVA-NeXT in use: answers equal transformers', adapters equal PEFT's and train alike in layouts, also on 4 bits."""

import json

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from megatron_vlm import registry
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.row import row_from_samples
from megatron_vlm.data.sample import Turn
from megatron_vlm.models.families.llava_next.processor import LlavaNextProcessor
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.layouts import Case, LayoutCheck
from megatron_vlm.testing.parity import layout_answers, layout_logits
from megatron_vlm.testing.twins.llava_next import hf_inputs, make_samples, write_tiny_llava_next
from megatron_vlm.testing.twins.peft import peft_gradients, peft_twin

NEW = 10
LORA = dict(target_modules="all-linear", r=3, alpha=6)
LOGITS = 2e-5  # of the largest logit
KINDS = ("LlavaNext", "LlavaOnevision")


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Kind -> (folder, transformers' model)."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    return {kind: (str(folder), write_tiny_llava_next(folder, kind)) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", ["LlavaNext", pytest.param("LlavaOnevision", marks=pytest.mark.full)])
def test_greedy_answers_equal_transformers(twins, kind):
    """Prompts without, with one and with two images."""
    folder, model = twins[kind]
    processor = LlavaNextProcessor.from_pretrained(folder, DataConfig(seq_length=1024))
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
    parallel = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    (rank, *_) = run_distributed(layout_answers, folder, prompts, [parallel], sampling, processor.stop_ids, tp=2, pp=2)
    assert [answer.ids for answer in rank[0]] == expected


@pytest.fixture(scope="module")
def adapters(twins):
    """Samples, PEFT's model and its tensors: pairs on every linear, the projector's among them."""
    folder, hf = twins["LlavaNext"]
    with open_source(folder) as source:
        samples = make_samples(source.config, [([(84, 23), (20, 50)], 14), ([], 20)])
    model, tensors = peft_twin(hf, LORA)
    assert any("multi_modal_projector.linear_1" in name for name in tensors)
    return samples, model, tensors


@pytest.mark.full
def test_adapters_equal_peft(twins, adapters):
    samples, model, tensors = adapters
    _, logits, _ = peft_gradients(model, samples, hf_inputs)
    rows, parallel = [row_from_samples(samples)], {"tensor_model_parallel_size": 2}
    lora = {"tensors": tensors, **LORA}
    ours, *_ = run_distributed(layout_logits, twins["LlavaNext"][0], rows, parallel, {}, lora, tp=2)
    assert float((ours["logits"][0] - logits).abs().max()) <= LOGITS * float(logits.abs().max())


FOUR_BITS = {"quantize": "nf4", "quantize_groups": ("vision", "connector", "llm")}
CASES = [Case(tp=2, cp=2, vision="share", updates=2), Case(tp=2, pp=2, sp=True, updates=2)]


@pytest.mark.full
@pytest.mark.parametrize("more", [{}, FOUR_BITS], ids=["lora", "nf4"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_adapters_train_alike_in_layouts(twins, adapters, case, more):
    folder, hf = twins["LlavaNext"]
    hf_config = json.loads(json.dumps(hf.config.to_dict()))
    config = registry.get("llava_next").config(hf_config)
    rows = [[([], 23)], [([(84, 23)], 14), ([], 9)], [([(28, 50), (50, 20)], 7)], [([], 17)]]
    LayoutCheck(
        family="llava_next",
        directory=folder,
        hf_config=hf_config,
        batches=[make_samples(config, row, seed=i) for i, row in enumerate(rows)],
        fill=128,
        peft={"tensors": adapters[2], **LORA, **more},
    ).check(case)
