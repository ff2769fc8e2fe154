"""Which folder is loaded, and which are removed."""

import shutil

import pytest

from megatron_vlm.errors import CheckpointError
from megatron_vlm.weights.checkpoint_dir import (
    TRACKER,
    candidates,
    compare,
    holds_checkpoints,
    newest,
    read_tracker,
    verify,
)
from tests.weights.checkpoint_folders import make


def names(found):
    return [folder.name for folder in found.folders]


def test_order_of_candidates(tmp_path):
    for iteration in (5, 10, 15, 20):
        make(tmp_path, iteration)
    assert names(candidates(tmp_path)) == ["iter_0000020", "iter_0000015", "iter_0000010", "iter_0000005"]
    for changed in (
        "10",
        "12",
        "120",
        "2\x30",
        "latest",
        None,
    ):  # believed nowhere: the order is that of the checkpoints
        (tmp_path / TRACKER).write_text(changed) if changed else (tmp_path / TRACKER).unlink()
        found = candidates(tmp_path)
        assert names(found) == ["iter_0000020", "iter_0000015", "iter_0000010", "iter_0000005"] and not found.explicit
        assert found.tracker == changed
    named = candidates(tmp_path, 15)
    assert names(named) == ["iter_0000015"] and named.explicit
    assert candidates(tmp_path / "iter_0000005").explicit
    assert candidates(tmp_path / "iter_0000005", 5).explicit


def test_the_newest_is_the_one_that_was_written_last(tmp_path):
    """A run that went back to iteration 10 and went on leaves later iterations of an abandoned run behind."""
    for iteration in (5, 10, 15, 20, 90, 15):
        make(tmp_path, iteration)
    assert names(candidates(tmp_path)) == [f"iter_{i:07d}" for i in (15, 90, 20, 10, 5)]
    (tmp_path / "iter_0000015" / "manifest.json").write_text("{")  # tried, and told of, before older ones
    assert names(candidates(tmp_path)) == [f"iter_{i:07d}" for i in (90, 20, 15, 10, 5)]


def test_a_tracker_is_compared_with_what_is_taken(tmp_path):
    chosen = make(tmp_path, 10)
    make(tmp_path, 5)
    assert compare(tmp_path, "10", chosen) is None
    said = compare(tmp_path, "5", chosen)
    assert (
        "says '5', but the newest sound checkpoint there is iter_0000010: taking that; --ckpt-step 5 takes the other"
        in said
    )
    assert "--ckpt-step" not in compare(tmp_path, "11", chosen)
    assert "has no latest_checkpointed_iteration.txt: taking the newest sound" in compare(tmp_path, None, chosen)
    (tmp_path / TRACKER).write_bytes(b"5\xff")
    assert read_tracker(tmp_path) == "not readable" and "says 'not readable'" in compare(
        tmp_path, "not readable", chosen
    )


def test_the_newest_sound_one_is_taken_and_the_others_told_of(tmp_path, caplog):
    for iteration in (5, 10, 15):
        make(tmp_path, iteration)
    (tmp_path / "iter_0000015" / "rank0.safetensors").write_bytes(b"")
    assert newest(tmp_path).name == "iter_0000010"
    said = [record.getMessage() for record in caplog.records]
    assert "iter_0000015 cannot be loaded, trying the one before it" in said[0] and "has 0 bytes" in said[0]
    assert "says '15', but the newest sound checkpoint there is iter_0000010" in said[1]
    with pytest.raises(CheckpointError, match=r"name another iteration\):\n.*rank0.safetensors has 0 bytes"):
        newest(tmp_path / "iter_0000015")
    for folder in tmp_path.glob("iter_*"):
        (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"start again from the weights, or a copy\):(\n.*){3}"):
        newest(tmp_path)
    with pytest.raises(CheckpointError, match="holds no training checkpoint"):
        newest(tmp_path / "iter_0000015" / "hf")


def test_a_model_in_a_folder_named_as_an_iteration_is_none(tmp_path):
    model = tmp_path / "iter_0000100"
    model.mkdir()
    assert candidates(model).explicit  # a checkpoint that lost all its files
    (model / "config.json").write_text("{}")
    assert candidates(model) is None


def test_what_cannot_be_a_candidate(tmp_path):
    make(tmp_path, 5)
    with pytest.raises(CheckpointError, match="has no iter_0000006"):
        candidates(tmp_path, 6)
    with pytest.raises(CheckpointError, match="--ckpt-step 6 another"):
        candidates(tmp_path / "iter_0000005", 6)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / TRACKER).write_text("latest")
    with pytest.raises(CheckpointError, match="neither an iteration nor 'release'"):
        candidates(empty)
    (empty / TRACKER).write_text("7")
    with pytest.raises(CheckpointError, match="names iter_0000007, which is absent; iterations there: none"):
        candidates(empty)
    (tmp_path / TRACKER).write_text("release")
    assert names(candidates(tmp_path)) == ["iter_0000005"]
    (tmp_path / "release").mkdir()
    assert candidates(tmp_path) is None  # Megatron weights may lie there
    (empty / TRACKER).write_text("release")
    with pytest.raises(CheckpointError, match="names release, which is absent; iterations there: none"):
        candidates(empty)


def test_a_folder_holds_checkpoints_with_or_without_its_tracker(tmp_path):
    assert not holds_checkpoints(tmp_path) and not holds_checkpoints(tmp_path / "absent")
    (tmp_path / "iter_0000005.tmp-abcdef").mkdir()  # a save that was killed
    assert not holds_checkpoints(tmp_path)
    folder = make(tmp_path, 5)
    assert holds_checkpoints(tmp_path) and holds_checkpoints(folder)
    (tmp_path / TRACKER).unlink()  # a kill came between the two
    assert holds_checkpoints(tmp_path) and newest(tmp_path) == folder
    shutil.rmtree(folder)
    (tmp_path / TRACKER).write_text("5")
    assert holds_checkpoints(tmp_path)  # the load says what is wrong, and nothing starts anew


def test_shares_of_hashing_cover_every_file(tmp_path):
    folder = make(tmp_path, 5)
    (folder / "hf" / "config.json").write_text("[]")  # same size
    caught = 0
    for share in range(3):
        try:
            verify(folder, share=share, shares=3)
        except CheckpointError as error:
            caught += "config.json was changed" in str(error)
    assert caught == 1
    verify(folder, hashes=False)
