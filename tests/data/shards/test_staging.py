"""The folder that a build works in."""

import pytest

from megatron_vlm.data.formats.records import RecordSource
from megatron_vlm.data.shards.staging import fingerprint_of, partial_folder
from megatron_vlm.errors import ConfigError


def test_it_goes_away_with_an_error_and_one_builds_at_a_time(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), partial_folder(out, "one") as folder:
        assert (folder / "build.json").read_text() == "one" and (folder / "out").is_dir()
        with pytest.raises(ConfigError, match=f"another process builds {out}"), partial_folder(out, "one"):
            pass
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_build_left_is_kept_for_the_same_build_alone(tmp_path):
    left = tmp_path / ".out.partial"
    for fingerprint, kept in (("one", True), ("two", False)):
        (left / "done").mkdir(parents=True)
        (left / "done" / "shard-0").write_text("")
        (left / "build.json").write_text("one")
        with partial_folder(tmp_path / "out", fingerprint) as folder:
            assert folder == left and (folder / "done" / "shard-0").exists() == kept


def test_files_that_a_killed_build_was_writing_go(tmp_path):
    left = tmp_path / ".out.partial"
    (left / "out" / "train").mkdir(parents=True)
    (left / "build.json").write_text("inputs")
    for name in (".manifest.json.host.7.0123abcd.tmp", "train/.train-000000.tar.host.7.0123abcd.tmp", "a-000000.tar"):
        (left / "out" / name).touch()
    with partial_folder(tmp_path / "out", "inputs") as folder:
        assert [path.name for path in (folder / "out").rglob("*") if path.is_file()] == ["a-000000.tar"]


def test_a_folder_that_holds_something_is_not_written_to(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(ConfigError, match="is not an empty folder"), partial_folder(tmp_path / "out", "one"):
        pass
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "build.json").write_text("one")  # this build, killed as it was done
    with partial_folder(tmp_path / "out", "one") as folder:
        assert folder is None


def test_a_fingerprint_changes_with_files_and_settings(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[]")
    source = RecordSource(format="llava", path=str(path))
    first = fingerprint_of([source], {"shard_size": 1})
    assert first == fingerprint_of([source], {"shard_size": 1}) != fingerprint_of([source], {"shard_size": 2})
    path.write_text("[ ]")
    assert first != fingerprint_of([source], {"shard_size": 1})
