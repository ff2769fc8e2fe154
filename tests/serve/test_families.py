"""`chat` line by line from a pipe, two turns over two ranks: every family says what `generate` and its reference say."""

import dataclasses
import json
import subprocess
import sys
from functools import partial

import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.images.pictures import decode_image
from megatron_vlm.data.sample import Turn
from megatron_vlm.testing.parity import hf_inputs
from megatron_vlm.testing.twins import (
    gemma3,
    internlm2,
    internvl3,
    llava_internlm2,
    llava_next,
    qwen2_5_vl,
    qwen3_vl,
    smolvlm,
    xcomposer2,
)
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.testing.twins.xcomposer2_reference import Reference
from tests.examples.shell import environment

NEW = 8
WRITERS = {
    "idefics2": (write_tiny_idefics2, hf_inputs),
    "internvl3": (
        partial(internvl3.write_tiny_internvl3, text=dict(model_type="qwen3", head_dim=12)),
        internvl3.hf_inputs,
    ),
    "qwen2_5_vl": (qwen2_5_vl.write_tiny_qwen2_5_vl, None),  # inputs by its config
    "qwen3_vl": (qwen3_vl.write_tiny_qwen3_vl, None),
    "gemma3": (gemma3.write_tiny_gemma3, gemma3.hf_inputs),
    "smolvlm": (smolvlm.write_tiny_smolvlm, smolvlm.hf_inputs),
    "internlm2": (internlm2.write_tiny_internlm2, internlm2.llama_inputs),
    "llava_internlm2": (llava_internlm2.write_tiny_llava_internlm2, llava_internlm2.llava_inputs),
    "llava_next": (partial(llava_next.write_tiny_llava_next, kind="LlavaOnevision"), llava_next.hf_inputs),
    "xcomposer2": (lambda folder: xcomposer2.write_tiny_xcomposer2(folder, "7b"), None),
}


def answer_ids(hf, inputs, folder, sample, stops):
    if inputs is None:
        ids, reference = sample.input_ids, Reference(folder)
        for _ in range(NEW):
            with torch.no_grad():
                following = reference.logits(dataclasses.replace(sample, input_ids=ids))[-1].argmax()
            ids = torch.cat([ids, following[None]])
    else:
        with torch.no_grad():
            options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0, bad_words_ids=None)
            ids = hf.generate(**inputs(sample), **options)[0]
    found = ids[len(sample.input_ids) :].tolist()
    return found[: next((i for i, token in enumerate(found) if token in stops), None)]


@pytest.mark.full
@pytest.mark.parametrize("family", WRITERS)
def test_two_turns_of_each_family(family, picture, tmp_path):
    write, inputs = WRITERS[family]
    (tmp_path / "model").mkdir()
    hf, talk = write(tmp_path / "model"), tmp_path / "talk.json"
    if family.startswith("qwen"):
        inputs = qwen2_5_vl.inputs_of(hf.config.to_dict())
    images = [] if family == "internlm2" else ["--image", str(picture)]
    program = [sys.executable, "-m", "megatron_vlm"]
    words = ["chat", str(tmp_path / "model"), "--device", "cpu", "--tp", "2", "--max-new-tokens", str(NEW), *images]
    lines = f"What digit is this?\n\nAnd now?\n/save {talk}\nEXIT\nnever asked\n"
    shared = dict(capture_output=True, text=True, timeout=300, env=environment())
    done = subprocess.run([*program, *words], input=lines, **shared)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(talk.read_text())
    roles = {"human": "user", "gpt": "assistant"}
    turns = [Turn(role=roles[turn["from"]], text=turn["value"]) for turn in record["conversations"]]
    assert len(turns) == 4
    spec = registry.get(family)
    processor = spec.open_processor(tmp_path / "model", DataConfig(seq_length=512))
    pictures = [decode_image(picture.read_bytes())] if images else []
    for place in (1, 3):
        sample = processor.encode_prompt(turns[:place], pictures)
        ids = answer_ids(hf, inputs, tmp_path / "model", sample, processor.stop_ids)
        assert turns[place].text == processor.decode(ids)
    words = ["generate", "--load", str(tmp_path / "model"), "--device", "cpu", "--max-new-tokens", str(NEW)]
    done = subprocess.run([*program, *words, "--input", str(talk)], **shared)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["answer"] == turns[3].text
