"""A new checkpoint appears whole and at once; old ones go, but for those that are needed."""

import pytest

from megatron_vlm.errors import CheckpointError
from megatron_vlm.files import read_json
from megatron_vlm.weights import checkpoint_dir
from megatron_vlm.weights.checkpoint_dir import (
    TRACKER,
    verify,
)
from megatron_vlm.weights.checkpoint_write import begin, commit, purge
from tests.weights.checkpoint_folders import make


def test_a_new_one_is_whole_and_tracked(tmp_path):
    folder = make(tmp_path / "new" / "root", 7)
    verify(folder)
    assert (folder.parent / TRACKER).read_text() == "7\n"
    files = read_json(folder / "manifest.json")["files"]
    assert sorted(files) == ["hf/config.json", "rank0.safetensors", "state.json"]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["iter_0000007", TRACKER]


def test_purge_keeps_the_last_the_loaded_and_the_later(tmp_path):
    for iteration in (5, 10, 15, 20, 90):
        make(tmp_path, iteration)
    begin(tmp_path, 15, 0)  # as a killed save leaves it
    purge(tmp_path, 20, 2, [tmp_path / "iter_0000005"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "iter_0000005",
        "iter_0000015",
        "iter_0000020",
        "iter_0000090",
        TRACKER,
    ]
    purge(tmp_path, 20, None)
    assert len(checkpoint_dir.iterations(tmp_path)) == 4


def test_an_iteration_saved_again_is_replaced(tmp_path):
    make(tmp_path, 5)
    make(tmp_path, 5, b"other")
    purge(tmp_path, 5, None)
    assert (tmp_path / "iter_0000005" / "rank0.safetensors").read_bytes() == b"other"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000005", TRACKER]


def test_a_disk_that_is_too_small_is_refused_first(tmp_path):
    with pytest.raises(CheckpointError, match="GB free, a checkpoint needs 1152921"):
        begin(tmp_path, 5, 2**80 // 2**20)
    assert not list(tmp_path.iterdir())


def test_files_of_other_nodes_must_be_visible(tmp_path):
    folder = begin(tmp_path, 5, 0)
    with pytest.raises(CheckpointError, match="a file system that all nodes share"):
        commit(folder, {"rank1.safetensors": {"size": 3, "sha256": ""}}, {})
    assert checkpoint_dir.iterations(tmp_path) == []
