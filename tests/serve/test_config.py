"""Which models a command line means."""

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.serve.config import ServeConfig, ServedModel


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (dict(vision="b"), "--visual-encoder goes with --llava"),
        (dict(llava="b", base="c"), "--base is of an adapter alone"),
    ],
)
def test_parts_that_do_not_go_together(model, words):
    with pytest.raises(ConfigError, match=words):
        ServedModel(load="a", **model)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(tp=0), "--tp must be at least 1"),
        (dict(video_frames=0), "--video-frames must be at least 1"),
        (dict(stop_words=[""]), "would end every answer"),
        (dict(precision="fp16", device="cpu"), "fp16 does not run on the CPU"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ConfigError, match=words):
        ServeConfig.from_dict({"models": [{"load": "a"}], **settings})
