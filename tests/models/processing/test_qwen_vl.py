"""What the processors of Qwen's families share: bounds of pixels from the files, sides of patches that no file says."""

import json

import pytest

from megatron_vlm.data.config import DataConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.families.qwen2_5_vl.processor import Qwen25VLProcessor
from megatron_vlm.testing.twins.qwen2_5_vl import write_tiny_qwen2_5_vl


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("qwen2_5_vl")
    write_tiny_qwen2_5_vl(root)
    return root


def processor_of(folder):
    return Qwen25VLProcessor.from_pretrained(folder, DataConfig(seq_length=1024))


def test_the_published_files_limits_are_read(folder, tmp_path):
    """As Qwen/Qwen2.5-VL-7B-Instruct has them: numbers of pixels far beyond a side."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    images = json.loads((tmp_path / "preprocessor_config.json").read_text())
    published = {**{k: v for k, v in images.items() if k != "size"}, "min_pixels": 3136, "max_pixels": 12845056}
    for content in (published, {**images, "size": {"shortest_edge": 3136, "longest_edge": 12845056}}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
        processor = processor_of(tmp_path)
        assert (processor.min_pixels, processor.max_pixels) == (3136, 12845056)


def test_a_side_that_no_file_says_is_transformers_own(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    images = json.loads((tmp_path / "preprocessor_config.json").read_text())
    del images["patch_size"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    with pytest.raises(ConfigError, match="patch_size 14 is not built for this model's tower: only 8 is"):
        processor_of(tmp_path)
