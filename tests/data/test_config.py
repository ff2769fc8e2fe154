"""Settings that cannot work are refused with their name and value."""

import pytest

from megatron_vlm.data.config import DataConfig
from megatron_vlm.errors import ConfigError


@pytest.mark.parametrize(
    "field, value",
    [
        ("seq_length", 1),
        ("num_workers", -1),
        ("prefetch_rows", 0),
        ("packing_window", 0),
        ("slice_size", 0),
        ("max_image_num", -1),
        ("image_size", 0),
        ("bad_sample_rate", 1.5),
    ],
)
def test_out_of_range(field, value):
    with pytest.raises(ConfigError, match=rf"data\.{field}.*{value}"):
        DataConfig(**{"seq_length": 64, field: value})


def test_round_trip_and_unknown_key():
    config = DataConfig(seq_length=64, train=("a", "b"), max_image_num=2)
    assert DataConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="did you mean 'packing'"):
        DataConfig.from_dict({"seq_length": 64, "pakcing": True})
