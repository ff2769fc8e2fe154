"""Twins that a whole session shares."""

import pytest

from megatron_vlm.testing.twins.model_folders import twin_maker


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    """name -> HF directory."""
    return twin_maker(tmp_path_factory.mktemp)
