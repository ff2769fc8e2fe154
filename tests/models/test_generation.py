"""Answers equal those of transformers' ``generate``, token by token, in every layout, alone and together."""

from functools import partial

import pytest

from megatron_vlm import registry
from megatron_vlm.models.generation import Answer
from megatron_vlm.testing.cards.references import hf_answer, plain_answer
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import hf_inputs, layout_answers, random_samples
from megatron_vlm.testing.twins import internlm2 as twin_internlm2
from megatron_vlm.testing.twins import internvl3 as twin_internvl3
from megatron_vlm.testing.twins import llava_internlm2 as twin_llava_internlm2
from megatron_vlm.testing.twins import qwen2_5_vl as twin_qwen2_5_vl
from megatron_vlm.testing.twins import qwen3_vl as twin_qwen3_vl
from megatron_vlm.testing.twins import xcomposer2 as twin_xcomposer2
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.testing.twins.xcomposer2_reference import Reference

NEW = 12
PROMPTS = [([(40, 50)], 9), ([], 13), ([(24, 48), (16, 16)], 4), ([], 3), ([(16, 16)], 6)]
LAYOUTS = [
    dict(),
    dict(tp=2),
    dict(tp=2, sp=True),
    dict(pp=2),
    dict(pp=2, vp=1),
    dict(tp=2, pp=2, sp=True),
]


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """Directory, prompts, stop ids, and HF's greedy answers."""
    directory = str(tmp_path_factory.mktemp("twin"))
    hf = write_tiny_idefics2(directory, "mistral", sliding_window=11)
    config = registry.get("idefics2").config(hf.config.to_dict())
    prompts = random_samples(config, PROMPTS)
    whole = [hf_answer(hf, prompt, NEW, hf_inputs) for prompt in prompts]
    stop_ids = (whole[0][5], whole[3][0])  # one answer ends in the middle, one before its first token
    expected = []
    for ids in whole:
        end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
        expected.append(Answer(ids=tuple(ids[:end]), finished=end is not None))
    assert {answer.finished for answer in expected} == {True, False}
    return directory, prompts, stop_ids, expected


def parallel_of(tp=1, pp=1, sp=False, vp=None):
    return dict(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=sp,
        num_layers_per_virtual_pipeline_stage=vp,
    )


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=lambda s: f"tp{s[0]}pp{s[1]}")
def test_greedy_answers_equal_hf(twin, sizes):
    directory, prompts, stop_ids, expected = twin
    layouts = [parallel_of(**layout) for layout in LAYOUTS if (layout.get("tp", 1), layout.get("pp", 1)) == sizes]
    if sizes == (2, 2):  # towers that are whole on tensor parallel ranks, and on later stages
        layouts += [{**parallel_of(*sizes), "vision_parallel": way} for way in ("share", "ahead")]
    sampling = dict(max_new_tokens=NEW, batch_size=3)
    for rank in run_distributed(
        layout_answers, directory, prompts, layouts, sampling, stop_ids, tp=sizes[0], pp=sizes[1]
    ):
        for found in rank:
            assert found == expected


def test_draws_depend_on_seed_and_prompt_alone(twin):
    directory, prompts, stop_ids, _ = twin

    def draw(**sampling):
        given = dict(max_new_tokens=NEW, temperature=1.0, batch_size=3) | sampling
        return run_distributed(layout_answers, directory, prompts, [{}], given, stop_ids)[0][0]

    together = draw()
    assert together == draw(batch_size=1) == draw(batch_size=5)
    assert together != draw(seed=1)


def test_a_nucleus_of_nothing_is_greedy(twin):
    directory, prompts, stop_ids, expected = twin
    sampling = dict(max_new_tokens=NEW, temperature=0.7, top_p=1e-6, batch_size=5)
    assert run_distributed(layout_answers, directory, prompts, [{}], sampling, stop_ids)[0][0] == expected


def internvl3(directory):
    hf = twin_internvl3.write_tiny_internvl3(directory)
    config = registry.get("internvl3").config(hf.config.to_dict())
    prompts = twin_internvl3.make_samples(config, [([2, 1], 9), ([], 13), ([3], 4)])
    return prompts, [hf_answer(hf, prompt, NEW, twin_internvl3.hf_inputs) for prompt in prompts]


def qwen2_5_vl(directory, write=twin_qwen2_5_vl.write_tiny_qwen2_5_vl):
    """The positions of an answer go on where those of the prompt end, which is below its number of tokens."""
    hf_config = (hf := write(directory)).config.to_dict()
    config, inputs = registry.get(hf_config["model_type"]).config(hf_config), twin_qwen2_5_vl.inputs_of(hf_config)
    prompts = twin_qwen2_5_vl.make_samples(config, [([(3, 4), (2, 2)], 9), ([], 13), ([(1, 5)], 4)])
    return prompts, [hf_answer(hf, prompt, NEW, inputs) for prompt in prompts]


def qwen3_vl(directory):
    """Three levels: the last is added on the second of two stages, as the first has two of the four layers."""
    vision = dict(deepstack_visual_indexes=[0, 1, 2])
    return qwen2_5_vl(directory, partial(twin_qwen3_vl.write_tiny_qwen3_vl, vision=vision))


def internlm2(directory):
    """Some answers go beyond the trained positions, where dynamic NTK scales with every token."""
    llama = twin_internlm2.write_tiny_internlm2(directory, max_position_embeddings=20)
    prompts = twin_internlm2.make_samples(llama.config.vocab_size, [5, 17, 26])
    return prompts, [hf_answer(llama, prompt, NEW, twin_internlm2.llama_inputs) for prompt in prompts]


def llava_internlm2(directory):
    hf = twin_llava_internlm2.write_tiny_llava_internlm2(directory)
    config = registry.get("llava_internlm2").config(hf.config.to_dict())
    prompts = twin_llava_internlm2.make_samples(config, [(2, 9), (0, 13), (1, 4)])
    return prompts, [hf_answer(hf, prompt, NEW, twin_llava_internlm2.llava_inputs) for prompt in prompts]


def xcomposer2(directory):
    """No class of transformers: the plain-torch reference, whole prompts anew for every token."""
    config = twin_xcomposer2.write_tiny_xcomposer2(directory, "7b")
    prompts = twin_xcomposer2.make_samples(config, [([(1, 1)] * 2, 9), ([], 13), ([(1, 1)], 4)])
    return prompts, [plain_answer(Reference(directory), prompt, NEW) for prompt in prompts]


@pytest.mark.parametrize(
    "family", [internvl3, internlm2, llava_internlm2, qwen2_5_vl, qwen3_vl, xcomposer2], ids=lambda f: f.__name__
)
def test_families_answer_as_their_references(tmp_path, family):
    prompts, whole = family(tmp_path)
    stop_ids = (whole[0][5],)
    expected = []
    for ids in whole:
        end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
        expected.append(Answer(ids=tuple(ids[:end]), finished=end is not None))
    layout = parallel_of(tp=2, pp=2, sp=True)
    sampling = dict(max_new_tokens=NEW, batch_size=3)
    for rank in run_distributed(layout_answers, str(tmp_path), prompts, [layout], sampling, stop_ids, tp=2, pp=2):
        assert rank == [expected]
