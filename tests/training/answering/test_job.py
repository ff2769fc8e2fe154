"""Settings of a job that asks."""

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.training.answering.job import AskConfig


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
