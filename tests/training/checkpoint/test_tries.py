"""What follows a save that failed."""

import pytest

from megatron_vlm.errors import CheckpointError
from megatron_vlm.training.checkpoint.config import CheckpointConfig
from megatron_vlm.training.checkpoint.tries import Tries


def test_waits_grow_then_it_stops_or_goes_on_and_the_last_save_always_stops():
    error = CheckpointError("full")
    for what, last in (("stop", False), ("continue", False), ("continue", True)):
        tries = Tries(CheckpointConfig(save="x", save_retries=3, save_retry_seconds=2.0, on_save_failure=what))
        assert [tries.failed(error, last) for _ in range(3)] == [2.0, 4.0, 8.0]
        if what == "stop" or last:
            with pytest.raises(CheckpointError, match="full"):
                tries.failed(error, last)
        else:
            assert tries.failed(error, last) is None
