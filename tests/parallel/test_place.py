"""Where a rank runs, by what its starter told it."""

import os

from megatron_vlm.parallel.place import Place


def test_the_parent_is_watched_under_torchrun_alone(monkeypatch):
    assert Place.of_environment().parent is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert Place.of_environment().parent == os.getppid()
