"""One path, one read, one write, one digest."""

import hashlib
import os
import subprocess
import sys

import pytest

from megatron_vlm import files
from megatron_vlm.errors import CheckpointError, ConfigError, DataError


def test_paths_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/mnt/data")
    assert str(files.expand_path("~/out")) == "/home/me/out"
    assert str(files.expand_path("$DATA/a/${DATA}")) == "/mnt/data/a/mnt/data"
    assert str(files.expand_path("a~/b$")) == "a~/b$"
    with pytest.raises(ConfigError, match=r"checkpoint.save .*NOWHERE is not set"):
        files.expand_path("$NOWHERE/x", "checkpoint.save")
    with pytest.raises(ConfigError, match="no_such_user"):
        files.expand_path("~no_such_user/x")
    monkeypatch.setenv("DATA", "")
    for empty in ("", "$DATA"):
        with pytest.raises(ConfigError, match=r"checkpoint\.save '.*' is empty: name a path"):
            files.expand_path(empty, "checkpoint.save")


def test_a_file_that_is_written_bit_by_bit_appears_whole_or_not_at_all(tmp_path):
    with files.synced_file(tmp_path / "list") as file:
        file.write(b"one")
        assert not (tmp_path / "list").exists()
    with pytest.raises(ConfigError), files.synced_file(tmp_path / "list") as file:
        file.write(b"two")
        raise ConfigError("no")
    assert [path.name for path in tmp_path.iterdir()] == ["list"] and (tmp_path / "list").read_bytes() == b"one"


def test_what_is_no_regular_file_is_an_error_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, words in (("pipe", "a pipe"), ("loop", "symbolic links"), ("none", "No such file"), (".", "a folder")):
        with pytest.raises(CheckpointError, match=words):
            files.read_bytes(tmp_path / name, CheckpointError)
        with pytest.raises(DataError, match=words):
            files.file_digest(tmp_path / name, DataError)
    with pytest.raises(ConfigError, match="a device"):
        files.read_text("/dev/zero")
    with pytest.raises(ConfigError, match="cannot read"):
        files.read_text("a\0b")
    with pytest.raises(ConfigError, match="File name too long"):
        files.read_text(tmp_path / ("x" * 300))


def test_reads_are_bounded_and_errors_name_the_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(ConfigError, match=r"x\.json has more than 99 bytes"):
        files.read_json(path, max_bytes=99)
    with pytest.raises(ConfigError, match=r"x\.json is not valid JSON"):
        files.read_json(path)
    for content, words in (
        (b"[1]", "must hold a JSON object, got list"),
        (b"\xff{}", "not UTF-8"),
        (b"{", "valid JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=words):
            files.read_json(path, DataError)
    path.write_text('{"a": "\\u00e9"}')
    assert files.read_json(path) == {"a": "é"}


def test_a_write_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x"
    files.write_synced(path, b"one")
    files.write_synced(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        files.write_synced(tmp_path / "folder", b"three")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "x"]
    assert files.file_digest(path) == {"size": 3, "sha256": hashlib.sha256(b"two").hexdigest()}


def test_temporary_names_are_nobody_elses_and_those_of_the_dead_go(tmp_path):
    out = tmp_path / ("o" * 250)
    mine, other = files.unique_temporary(out), files.unique_temporary(out)
    assert mine != other
    mine.mkdir()
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead = mine.with_name(mine.name.replace(f".{os.getpid()}.", f".{ended.stdout.strip()}."))
    dead.mkdir()
    (dead / "part").write_text("x")
    files.remove_abandoned(out)
    assert list(tmp_path.iterdir()) == [mine]


def test_temporary_names_of_another_host_or_pid_namespace_stay(tmp_path, monkeypatch):
    """Pods with long names on one shared folder: each has a process 1."""
    out = tmp_path / "out"
    theirs = []
    for host, space in (("p" * 40 + "-a", "pid:[1]"), ("p" * 40 + "-b", "pid:[1]"), ("p" * 40 + "-b", "pid:[2]")):
        monkeypatch.setattr(files.socket, "gethostname", lambda host=host: host)
        monkeypatch.setattr(files.os, "readlink", lambda path, space=space: space)
        monkeypatch.setattr(files, "process_lives", lambda pid: False)
        files.remove_abandoned(out, others=True)
        theirs.append(files.unique_temporary(out))
        theirs[-1].mkdir()
    assert sorted(tmp_path.iterdir()) == sorted(theirs)
    files.remove_abandoned(out, others=True)
    assert sorted(tmp_path.iterdir()) == sorted(theirs[:2])


def test_names_in_messages_are_text(tmp_path):
    assert files.describe(os.fsencode(tmp_path) + b"/\xff") == f"{tmp_path}/\\xff"
    assert len(files.describe("x" * 4000)) < 300
