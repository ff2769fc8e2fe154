"""The section ``logging``."""

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.training.metrics.config import LoggingConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(log_interval=0), "log_interval must be at least 1, got 0"),
        (dict(tensorboard=False, tensorboard_dir="x"), "tensorboard_dir has no effect while"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoggingConfig.from_dict(settings)
