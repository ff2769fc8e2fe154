"""Settings of a job that asks; images and frames as its model's run saw them."""

import json
from pathlib import Path

import pytest

from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.errors import ConfigError
from megatron_vlm.testing.twins.small_families import write_small_twin
from megatron_vlm.training.answering.job import AskConfig, processor_for


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"limit": 0}, "--limit must be at least 1"),
        ({"precision": "fp16", "device": "cpu"}, "fp16 does not run on the CPU"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ConfigError, match=words):
        AskConfig.from_dict({"load": "x", **settings})


def test_bounds_of_pixels_are_those_of_the_run(tmp_path):
    folder = Path(write_small_twin("qwen2_5_vl", tmp_path / "model").directory)
    data = {"max_pixels": 3000, "video_max_pixels": 2048, "video_total_pixels": None, "seq_length": 77}
    with open_source(folder) as source:
        (folder / "state.json").write_text(json.dumps({"run": {"config": {"data": data}}}))
        processor = processor_for(source, {"video_total_pixels": 9000})
        assert (processor.max_pixels, processor.frame_pixels[1], processor.total_pixels) == (3000, 2048, 9000)
        assert processor.seq_length == source.config.text.longest
        assert processor_for(source, {"max_pixels": 2500}).max_pixels == 2500
