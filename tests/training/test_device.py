"""The device of a rank."""

import pytest
import torch

from megatron_vlm.errors import ConfigError
from megatron_vlm.training.device import start_device


def test_the_cpu_needs_nothing():
    assert start_device("cpu") == torch.device("cpu")


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(ConfigError, match=rf"local rank {torch.cuda.device_count()} has no GPU: this node has"):
        start_device("cuda")
