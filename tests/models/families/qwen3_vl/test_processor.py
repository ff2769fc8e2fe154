"""Qwen3VLProcessor: ids, pixels and positions against transformers' own; labels by hand; refusals."""

import json

import pytest
from transformers import Qwen3VLForConditionalGeneration

from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.row import IGNORE_INDEX
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.families.qwen3_vl.processor import Qwen3VLProcessor
from megatron_vlm.testing.twins.qwen2_5_vl import hf_processor
from megatron_vlm.testing.twins.qwen3_vl import write_tiny_qwen3_vl
from tests.models.families.internvl3.test_processor import CHINA, turns_of
from tests.models.families.qwen2_5_vl.test_processor import assert_equal_to_transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("qwen3_vl")
    write_tiny_qwen3_vl(root)
    return root


def processor_of(folder, **config):
    return Qwen3VLProcessor.from_pretrained(folder, DataConfig(**{"seq_length": 1024, **config}))


def test_equal_to_transformers(folder):
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder).model
    assert_equal_to_transformers(hf_processor(folder, "Qwen3VLProcessor"), processor_of(folder), model)


def test_labels(folder):
    processor = processor_of(folder, answer_loss_only=True)
    images = [CHINA.resize((64, 32)), CHINA.resize((32, 32))]
    for system in (None, "Be brief."):
        sample = processor.encode(
            "k", turns_of("<image>\nWhat?", "two", "And <image>?", "a cat", system=system), images
        )
        kept = sample.labels != IGNORE_INDEX
        assert processor.tokenizer.decode(sample.labels[kept].tolist()) == "two<|im_end|>a cat<|im_end|>"
        shown = processor.tokenizer.decode(sample.input_ids.tolist())
        for count in (8, 4):
            shown = shown.replace("<|image_pad|>" * count, f"({count})")
        assert shown == ("<|im_start|>system\nBe brief.<|im_end|>\n" if system else "") + (
            "<|im_start|>user\n<|vision_start|>(8)<|vision_end|>\nWhat?<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
            "<|im_start|>user\nAnd <|vision_start|>(4)<|vision_end|>?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n"
        )


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("preprocessor_config.json", {"patch_size": 14}, "patch_size 14"),
        ("chat_template.jinja", THINKING, "chat template that is not Qwen3-VL's: it makes .*<think>"),
    ],
)
def test_files_of_another_model_are_refused(folder, tmp_path, file, change, message):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = change if isinstance(change, str) else json.dumps({**json.loads((tmp_path / file).read_text()), **change})
    (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=message):
        processor_of(tmp_path)
