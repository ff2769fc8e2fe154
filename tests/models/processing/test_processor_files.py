"""What an export tells transformers of where an answer ends: the end of a turn, on top of what the base says."""

import json
from pathlib import Path

import pytest
import torch

from megatron_vlm import registry
from megatron_vlm.conversion.convert import export_hf, hf2mg
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.models.processing.processor_files import add_stops, set_pixels
from megatron_vlm.testing.twins.small_families import NAMES, write_small_twin

TURN_ENDS = {
    "gemma3": "<end_of_turn>",
    "idefics2": "<end_of_utterance>",
    "idefics2_llama3": "<end_of_utterance>",
    "internvl3": "<|im_end|>",
    "llava_internlm2": "</s>",  # the twin's vocabulary has Vicuna's tokens alone
    "llava_next": "</s>",
    "llava_onevision": "<|im_end|>",
    "qwen2_5_vl": "<|im_end|>",
    "qwen3_vl": "<|im_end|>",
    "xcomposer2": "[UNUSED_TOKEN_145]",
    "xcomposer2_hd": "[UNUSED_TOKEN_145]",
    "smolvlm": "<end_of_utterance>",
    "internlm2": "<|im_end|>",
}
NAMED = {"xcomposer2_hd": "xcomposer2", "llava_onevision": "llava_next"}
BASES = {
    "none": None,
    "without": {"top_k": 5},
    "a number": {"eos_token_id": 7, "top_k": 5},
    "a list": {"eos_token_id": [9, 7]},
}


def token_id(directory, family, token):
    from megatron_vlm.data.config import DataConfig

    data = DataConfig(seq_length=64, hd_num=4 if family == "xcomposer2_hd" else None)
    spec = registry.get(NAMED.get(family, family))
    return spec.processor(directory, data).tokenizer.token_id(token)


@pytest.mark.parametrize("name", NAMES)
def test_an_export_ends_where_a_turn_does(tmp_path, name):
    from transformers import GenerationConfig

    twin = write_small_twin(name, tmp_path / "base")
    path = tmp_path / "base/generation_config.json"
    wanted = token_id(twin.directory, name, TURN_ENDS[name])
    assert wanted is not None
    layouts = [None, *registry.get(twin.family).exports]
    for number, (base, content) in enumerate(BASES.items()):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(json.dumps(content))
        for layout in layouts:
            out = tmp_path / f"{number}{layout}"
            with open_source(twin.directory) as source:
                export_hf(source, out, naming=layout)
            found = GenerationConfig.from_pretrained(out).eos_token_id if (out / path.name).is_file() else None
            if found is None:  # transformers takes those of config.json
                found = json.loads((out / "config.json").read_text())
                found = found.get("eos_token_id") or found["text_config"]["eos_token_id"]
            found = found if isinstance(found, list) else [found]
            assert wanted in found, (base, layout)
            assert len(found) == len(set(found))
            if layout is None and content is not None:
                before = content.get("eos_token_id", [])
                before = before if isinstance(before, list) else [before]
                assert found[: len(before)] == before
                assert json.loads((out / path.name).read_text()).get("top_k") == content.get("top_k")


def test_transformers_stops_at_the_end_of_a_turn_of_a_base_that_says_nothing(tmp_path):
    """Through Megatron's weights and back; what transformers would derive from config.json is kept beside the new end."""
    from transformers import Idefics2ForConditionalGeneration, LogitsProcessorList

    twin = write_small_twin("idefics2", tmp_path / "base")
    end = token_id(twin.directory, "idefics2", "<end_of_utterance>")
    (tmp_path / "base/generation_config.json").unlink()
    hf2mg(twin.directory, tmp_path / "megatron", tp=2)
    with open_source(tmp_path / "megatron") as source:
        export_hf(source, tmp_path / "out")
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    text = twin.hf_config["text_config"]
    assert written["eos_token_id"] == [text["eos_token_id"], end]
    assert (written["bos_token_id"], written["pad_token_id"]) == (text["bos_token_id"], text["pad_token_id"])

    def third_is_the_end(ids, scores):
        forced, value = ([end], 1e9) if ids.shape[1] == 5 else ([end, 2], -1e9)
        return scores.index_fill(1, torch.tensor(forced), value)

    ids = torch.tensor([[1, 20, 30]])
    for folder, length in (("out", 6), ("base", 12)):
        model = Idefics2ForConditionalGeneration.from_pretrained(tmp_path / folder).eval()
        answer = model.generate(
            input_ids=ids,
            max_new_tokens=9,
            do_sample=False,
            logits_processor=LogitsProcessorList([third_is_the_end]),
        )
        assert answer.shape[1] == length, folder


def test_nothing_is_written_where_nothing_is_missing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [2, 5], "text_config": {"bos_token_id": 1}}))
    add_stops(tmp_path, [5])
    assert not (tmp_path / "generation_config.json").exists()
    text = '{"eos_token_id": 5,   "odd": 1}'
    (tmp_path / "generation_config.json").write_text(text)
    add_stops(tmp_path, [5])
    assert (tmp_path / "generation_config.json").read_text() == text
    add_stops(tmp_path, [5, 8])
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [5, 8], "odd": 1}


def test_weights_without_a_tokenizer_are_exported_with_a_warning(tmp_path, caplog):
    twin = write_small_twin("idefics2", tmp_path / "base")
    for file in Path(twin.directory).glob("*token*"):
        file.unlink()
    with open_source(twin.directory) as source:
        export_hf(source, tmp_path / "out")
    assert "what ends an answer is not known" in caplog.text


@pytest.mark.parametrize(
    "name, section", [("preprocessor_config.json", None), ("processor_config.json", "image_processor")]
)
def test_bounds_of_pixels(tmp_path, name, section):
    """As transformers reads them: its own edges, and the older names, which count before these."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    for images in ({"size": {"shortest_edge": 64, "longest_edge": 640}}, {"min_pixels": 64, "max_pixels": 640}):
        content = {section: images} if section else images
        (tmp_path / name).write_text(json.dumps(content))
        set_pixels(tmp_path, {})
        assert json.loads((tmp_path / name).read_text()) == content
        set_pixels(tmp_path, {"max_pixels": 500})
        found = json.loads((tmp_path / name).read_text())
        size = Qwen2VLImageProcessorPil(**(found[section] if section else found)).size
        assert (size["shortest_edge"], size["longest_edge"]) == (64, 500)
