"""Answers equal those of transformers' ``generate``, token by token, in every layout, alone and together."""

import pytest
import torch

from megatron_vlm.models import registry
from megatron_vlm.models.generation import Answer
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.parity import hf_inputs, layout_answers, random_samples
from megatron_vlm.testing.twins import write_tiny_idefics2

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
    whole = [hf_answer(hf, prompt, None) for prompt in prompts]
    stop_ids = (whole[0][5], whole[3][0])  # one answer ends in the middle, one before its first token
    expected = []
    for ids in whole:
        end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
        expected.append(Answer(ids=tuple(ids[:end]), finished=end is not None))
    assert {answer.finished for answer in expected} == {True, False}
    return directory, prompts, stop_ids, expected


def hf_answer(hf, prompt, eos):
    with torch.no_grad():
        out = hf.generate(
            **hf_inputs(prompt),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
            bad_words_ids=None,
        )
    return out[0, len(prompt.input_ids) :].tolist()


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
