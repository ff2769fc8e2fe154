"""A tiny model to talk to, and a picture."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2


@pytest.fixture(scope="session")
def twins(tmp_path_factory) -> tuple[Path, Path]:
    """Two checkpoints of other weights."""
    folders = tmp_path_factory.mktemp("talk") / "base", tmp_path_factory.mktemp("talk") / "tuned"
    for seed, folder in enumerate(folders):
        write_tiny_idefics2(folder, std=0.15, layers=4, seed=seed)
    return folders


@pytest.fixture(scope="session")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("a picture's") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(path)
    return path
