"""Numbers in a model's files that cannot be, or that its weights contradict: key and file are named, nothing is built."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_vlm.conversion.convert import hf2mg
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.data.config import DataConfig
from megatron_vlm.errors import ConfigError, ConversionError, MegatronVLMError
from megatron_vlm.models.hf_config import check_numbers
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.testing.twins.internlm2 import write_tiny_internlm2
from megatron_vlm.testing.twins.internvl3 import write_tiny_internvl3
from megatron_vlm.testing.twins.llava_internlm2 import write_tiny_llava
from megatron_vlm.testing.twins.xcomposer2 import write_tiny_xcomposer2

WRITE = {
    "idefics2": write_tiny_idefics2,
    "internvl3": write_tiny_internvl3,
    "llava_internlm2": write_tiny_llava,
    "xcomposer2": write_tiny_xcomposer2,
    "internlm2": write_tiny_internlm2,
}
TEXT = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
IMPOSSIBLE = (10**12, 0, -4, "64", None, float("nan"), 1.5, [64], {}, True)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    made = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            WRITE[family](made[family])
        return made[family]

    return make


def edited(model: Path, copy: Path, path: tuple[str, ...], value, name="config.json") -> Path:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(model, copy)
    config = json.loads((copy / name).read_text())
    node = config
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (copy / name).write_text(json.dumps(config))
    return copy


def sizes(family: str, config: dict) -> list[tuple[str, ...]]:
    """Places of sizes in a config.json."""
    where = ("text_config",) if "text_config" in config else ()
    places = [(*where, key) for key in TEXT if key in (config["text_config"] if where else config)]
    vision = config.get("vision_config") or {}
    places += [("vision_config", key) for key in (*TEXT, "image_size", "patch_size", "num_channels") if key in vision]
    if family == "xcomposer2":  # its tower's images are of the size that the model names
        places[places.index(("vision_config", "image_size"))] = ("img_size",)
    return places


@pytest.mark.parametrize("family", WRITE)
def test_sizes_that_cannot_be_are_refused(models, tmp_path, family):
    model = models(family)
    for path in sizes(family, json.loads((model / "config.json").read_text())):
        for value in IMPOSSIBLE:
            with pytest.raises(MegatronVLMError, match=r"config\.json.*|config_json") as caught:
                open_source(edited(model, tmp_path / "model", path, value)).close()
            assert str(tmp_path / "model") in str(caught.value)


@pytest.mark.parametrize("family", WRITE)
def test_sizes_that_the_weights_contradict_name_key_and_both_numbers(models, tmp_path, family):
    model = models(family)
    config = json.loads((model / "config.json").read_text())
    for path in sizes(family, config):
        node = config
        for key in path:
            node = node[key]
        if (
            isinstance(node, list) or path[-1] == "num_attention_heads"
        ):  # as many heads of half the width have the same shapes
            continue
        with pytest.raises(MegatronVLMError) as caught:
            open_source(edited(model, tmp_path / "model", path, node * 2)).close()
        message = str(caught.value)
        assert path[-1].replace("img_", "image_") in message and f"{node * 2:,}" in message, (path, message)
        if path[-1] != "patch_size":
            assert "the files hold" in message or str(node) in message, (path, message)


def test_a_megatron_copy_is_compared_too(models, tmp_path):
    hf2mg(models("internlm2"), tmp_path / "mg")
    path = tmp_path / "mg" / "hf" / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 64', '"hidden_size": 32'))
    with pytest.raises(ConversionError, match=r"config\.json was changed"):
        open_source(tmp_path / "mg")
    with pytest.raises(ConversionError, match=r"hidden_size 32, which makes 32 .* the files hold 64"):
        open_source(tmp_path / "mg", verify_hashes=False)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"image_mean": [0.5, 0.5]}, "image_mean .* list of 3 numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std .* list of 3 numbers"),
        ({"image_mean": "x"}, "image_mean is 'x'"),
        ({"rescale_factor": float("inf")}, "rescale_factor is inf"),
        ({"resample": 99}, "resample is 99"),
        ({"size": {"longest_edge": 10**9}}, "size.longest_edge is 1000000000"),
        ({"size": {"height": 0, "width": 0}}, "size.height is 0"),
        ({"crop_size": -1}, "crop_size.height is -1"),
        ({"max_patches": 10**12}, "max_patches is 1000000000000"),
        ({"image_processor": {"image_std": [1]}}, "image_processor.image_std"),
        ({"image_processor": []}, r"image_processor is \[\]"),
    ],
)
def test_numbers_of_a_processor(settings, words):
    with pytest.raises(ConfigError, match=words):
        check_numbers(settings)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("tokenizer.json", "{", "cannot load the tokenizer of .*model"),
        (
            "tokenizer.json",
            '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": 1}}',
            "cannot load the tokenizer of .*model",
        ),
        ("tokenizer_config.json", "[]", "model"),
        ("generation_config.json", '{"eos_token_id": [2, "x"]}', "generation_config.json: eos_token_id is 'x'"),
        ("generation_config.json", '{"eos_token_id": 1e99}', "generation_config.json: eos_token_id"),
        ("chat_template.json", '{"chat_template": 5}', r"chat_template\.json: 'chat_template' must be a text"),
        (
            "processor_config.json",
            '{"image_processor": {"image_mean": [1, 2]}}',
            r"processor_config\.json: .*image_mean",
        ),
    ],
)
def test_damaged_files_of_a_processor_are_named(models, tmp_path, name, content, words):
    copy = shutil.copytree(models("idefics2"), tmp_path / "model")
    if "chat_template" in content:
        (copy / "chat_template.jinja").unlink()
    (copy / name).write_text(content)
    with open_source(copy) as source, pytest.raises(ConfigError, match=words):
        source.spec.open_processor(source.hf_dir, DataConfig(seq_length=64))


def test_a_tokenizer_that_contradicts_itself_is_named(models, tmp_path):
    """Two tokens of one id: transformers takes them, and which of them is left differs from start to start."""
    copy = shutil.copytree(models("idefics2"), tmp_path / "model")
    content = json.loads((copy / "tokenizer.json").read_text())
    content["model"]["vocab"]["Ġdark"] = 1
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with open_source(copy) as source, pytest.raises(ConfigError, match=r"tokenizer of .*model gives id 1 to 2 tokens"):
        source.spec.open_processor(source.hf_dir, DataConfig(seq_length=64))


def test_the_layout_of_llavas_own_code_is_told_apart(models, tmp_path):
    copy = edited(
        models("llava_internlm2"), tmp_path / "model", ("mm_vision_tower",), "openai/clip-vit-large-patch14-336"
    )
    with pytest.raises(MegatronVLMError, match=r"layout of its original code .*llava-hf"):
        open_source(copy)
