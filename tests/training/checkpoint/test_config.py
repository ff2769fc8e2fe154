"""The section ``checkpoint``."""

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.training.checkpoint.config import CheckpointConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(save="s", save_interval=0), "save_interval must be above 0, got 0"),
        (dict(save="s", save_epochs=-1.0), r"save_epochs must be above 0, got -1\.0"),
        (dict(save_interval=5), r"save_interval is 5, but checkpoint\.save is not set: name a folder"),
        (dict(save="s", save_interval=5, save_epochs=1.0), "not both"),
        (dict(save="s", keep_last=1), "keep_last must be at least 2, got 1"),
        (dict(ckpt_step=3), r"ckpt_step 3 needs checkpoint\.load"),
        (dict(load="l", ckpt_step=-3), "must not be negative"),
        (dict(base="b"), r"checkpoint\.base b, but checkpoint\.load names no adapters"),
        (dict(save_retries=-1), "may be negative"),
        (dict(on_save_failure="retry"), "on_save_failure"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        CheckpointConfig.from_dict(settings)


def test_settings_that_work_together():
    config = CheckpointConfig(load="l", save="s", save_epochs=0.5, keep_last=2, ckpt_step=0, base="b")
    assert config.save_retries == 2 and config.on_save_failure == "stop" and config.verify_hashes
