"""Which folders a run may save into that hold checkpoints already."""

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.training.checkpoint.config import CheckpointConfig
from megatron_vlm.training.checkpoint.load import Checkpoint
from megatron_vlm.training.checkpoint.output_check import check_kept


@pytest.fixture
def runs(tmp_path):
    """Two runs with checkpoints at 10 and 20."""
    for run in ("r1", "r2"):
        for number in (10, 20):
            (tmp_path / run / f"iter_{number:07d}").mkdir(parents=True)
    return tmp_path


def check(runs, load, save, start):
    folder, found = runs / load, None
    if load != "model":
        folder = folder if folder.name.startswith("iter_") else folder / "iter_0000020"
        state = dict(iteration=start, state={}, scaler=None, layout="", weights_only=not start)
        found = Checkpoint(folder=folder, **state)
    check_kept(CheckpointConfig(load=str(runs / load), save=str(runs / save)), found, start)


def test_later_checkpoints_of_another_run_are_kept(runs):
    for load, start, names in (("model", 0, "10, 20"), ("r1", 15, "20"), ("r1/iter_0000010", 10, "20")):
        with pytest.raises(ConfigError) as error:
            check(runs, load, "r2", start)
        assert f"{runs / 'r2'} holds checkpoints of another run (iterations {names})" in str(error.value)
        assert f"starts at {start} from {runs / load}" in str(error.value)


def test_a_run_goes_on_in_its_own_folder(runs):
    check(runs, "r1", "r1", 20)
    check(runs, "r1/iter_0000010", "r1", 10)  # back to an earlier one
    check(runs, "r1", "r1", 0)  # finetune
    (runs / "link").symlink_to(runs / "r1")
    check(runs, "link", "r1", 10)
    check(runs, "r1", "link", 10)
    check(runs, "r1", "r2", 20)  # as a copy of it would be
    check(runs, "model", "new", 0)
