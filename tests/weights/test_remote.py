"""Checkpoints in a store: whole there or not at all, the newest sound one brought here; on a server that speaks S3."""

import os
import shutil
import subprocess

import pytest

from megatron_vlm.errors import CheckpointError
from megatron_vlm.files import unique_temporary
from megatron_vlm.weights import remote
from megatron_vlm.weights.checkpoint_dir import TRACKER, iterations, verify
from megatron_vlm.weights.checkpoint_write import begin, finish
from megatron_vlm.weights.hf_io import resolve_directory
from tests.weights.checkpoint_folders import make
from tests.weights.store import BUCKET, s3_store


@pytest.fixture(scope="module")
def store():
    with s3_store() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield remote.Store(f"s3://{BUCKET}")._files


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_WAIT_SECONDS", 0.001)


def test_up_and_down_again_the_newest_sound_one_or_the_one_named(store, tmp_path):
    url, here = f"s3://{BUCKET}/a/run", tmp_path / "here"
    for iteration in (5, 10, 20):
        remote.upload(make(here, iteration, bytes([iteration]) * 5000), url, keep_last=2)
    assert remote.iterations(url) == [10, 20] and store.cat_file(f"{BUCKET}/a/run/{TRACKER}") == b"20\n"
    assert not store.exists(f"{BUCKET}/a/run/iter_0000005")
    remote.upload(
        make(here, 15, b"back"), url, keep_last=None
    )  # a run that went back to 10: its last one is the newest
    found = remote.fetch(url)
    verify(found)
    assert found.name == "iter_0000015" and (found / "rank0.safetensors").read_bytes() == b"back"
    assert remote.fetch(url, ckpt_step=20).name == remote.fetch(f"{url}/iter_0000020/").name == "iter_0000020"
    assert resolve_directory(url) == found
    stamp = (found / "rank0.safetensors").stat().st_mtime_ns
    assert (
        remote.fetch(url) == found and (found / "rank0.safetensors").stat().st_mtime_ns == stamp
    )  # it is here already
    mine = tmp_path / "mine"
    assert remote.fetch(url, into=mine) == mine and iterations(mine) == [15] and (mine / TRACKER).read_text() == "15\n"

    store.pipe_file(f"{BUCKET}/a/run/iter_0000015/rank0.safetensors", b"bach")
    shutil.rmtree(found)
    assert remote.fetch(url).name == "iter_0000020"
    with pytest.raises(CheckpointError, match=r"iterations there: 10, 15, 20\)\n .*rank0.safetensors was changed"):
        remote.fetch(url, ckpt_step=15)
    with pytest.raises(CheckpointError, match=r"iter_0000007 has no manifest.json"):
        remote.fetch(url, ckpt_step=7)


def test_killed_fetches_of_other_iterations_go(store, tmp_path):
    """What a process that lives is fetching stays."""
    url, cache = f"s3://{BUCKET}/killed", tmp_path / "cache" / "megatron_vlm" / "remote"
    remote.upload(make(tmp_path / "here", 5), url, None)
    root = remote.fetch(url).parent
    assert root.parent == cache
    alive, gone = unique_temporary(root / "iter_0000003"), subprocess.Popen(["true"])
    gone.wait()
    dead = alive.with_name(alive.name.replace(f".{os.getpid()}.", f".{gone.pid}."))
    for folder in (alive, dead):
        folder.mkdir()
        (folder / "rank0.safetensors").write_bytes(b"half")
    remote.fetch(url)
    assert alive.exists() and not dead.exists()


def test_what_is_no_training_checkpoint_comes_as_a_folder(store, tmp_path):
    url = f"s3://{BUCKET}/model"
    store.pipe({f"{BUCKET}/model/config.json": b"{}", f"{BUCKET}/model/sub/x.txt": b"x"})
    found = remote.fetch(url)
    assert sorted(str(path.relative_to(found)) for path in found.rglob("*.*")) == ["config.json", "sub/x.txt"]
    with pytest.raises(CheckpointError, match="nothing: neither checkpoints nor a model"):
        remote.fetch(f"s3://{BUCKET}/absent")


def test_a_kill_or_a_failure_at_any_file_leaves_the_one_before(store, tmp_path, monkeypatch):
    url, here, real = f"s3://{BUCKET}/b", tmp_path / "here", remote.Store.put
    remote.upload(make(here, 1), url, None)
    second, calls = make(here, 2), []

    def put(self, path, name):
        calls.append(name)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return real(self, path, name)

    monkeypatch.setattr(remote.Store, "put", put)
    for stop in range(1, 6):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            remote.upload(second, url, None)
        whole = stop > 4  # only the tracker is left
        assert remote.iterations(url) == [1, 2][: 1 + whole]
        assert remote.fetch(url).name == f"iter_000000{1 + whole}"
    assert calls[-2:] == ["iter_0000002/manifest.json", TRACKER]


def test_a_store_that_refuses_is_tried_again_and_then_named(store, tmp_path, monkeypatch, caplog):
    folder, real, tries = make(tmp_path, 1), store.put_file, []

    def refuse(*arguments, **_):
        tries.append(arguments)
        if len(tries) < 3 or forever:
            raise PermissionError("Access Denied")
        return real(*arguments)

    monkeypatch.setattr(store, "put_file", refuse)
    forever = False
    with caplog.at_level("WARNING", logger="megatron_vlm"):
        remote.upload(folder, f"s3://{BUCKET}/c", None)
    assert caplog.text.count("failed, ") == 2 and "2 more tries, the next in 0.002 s: PermissionError" in caplog.text
    forever = True
    with pytest.raises(
        CheckpointError, match=rf"uploading .* to s3://{BUCKET}/d/.* failed 4 times, the last with PermissionE"
    ):
        remote.upload(folder, f"s3://{BUCKET}/d", None)
    (folder / "rank0.safetensors").write_bytes(b"Weights")
    with pytest.raises(CheckpointError, match="was changed"):
        remote.upload(folder, f"s3://{BUCKET}/e", None)
    monkeypatch.setattr(store, "ls", refuse)
    with pytest.raises(CheckpointError, match="listing s3://nobody/x failed 4 times"):
        remote.iterations("s3://nobody/x")
    with pytest.raises(CheckpointError, match=r"foo://x cannot be used \(Protocol not known: foo"):
        remote.iterations("foo://x")


def test_a_run_that_went_back_on_another_host_is_the_newest(store, tmp_path):
    """Its folder knows of one save, the store of three: the next one comes after all of them."""
    url, here = f"s3://{BUCKET}/f", tmp_path / "here"
    for iteration in (1, 2, 3):
        remote.upload(make(here, iteration), url, None)
    assert remote.newest_sequence(url) == 3 and remote.newest_sequence(f"s3://{BUCKET}/nobody") == 0
    back = remote.fetch(url, into=tmp_path / "back", ckpt_step=1)
    temporary = begin(back, 2, 100)
    (temporary / "x").write_text("x")
    finish(temporary, {}, {"num_ranks": 0}, {}, None, None, (), url)
    found = remote.fetch(url)
    assert found.name == "iter_0000002" and (found / "x").is_file()


def test_a_save_whose_number_the_store_does_not_tell_stays_here_and_goes_nowhere(store, tmp_path, monkeypatch):
    """Numbered without the store it could be older than one there; tried again, it is numbered rightly."""
    url, root = f"s3://{BUCKET}/k", tmp_path / "run"
    remote.upload(make(tmp_path / "other", 5, after=6), url, None)

    def refuse(*_, **__):
        raise ConnectionError("reset")

    def save():
        temporary = begin(root, 2, 100)
        (temporary / "x").write_text("x")
        finish(temporary, {}, {"num_ranks": 0}, {}, None, None, (), url)

    with monkeypatch.context() as patch:
        patch.setattr(store, "ls", refuse)
        with pytest.raises(CheckpointError, match=r"listing s3://.* failed 4 times"):
            save()
    assert iterations(root) == [2] and remote.iterations(url) == [5]
    save()
    assert remote.fetch(url).name == "iter_0000002"


def test_a_later_save_that_the_store_has_not_got_stays(store, tmp_path):
    url, mine = f"s3://{BUCKET}/g", tmp_path / "mine"
    remote.upload(make(tmp_path / "other", 4, b"old", after=3), url, None)
    make(mine, 4, b"new", after=4)
    remote.fetch(url, into=mine)
    assert (mine / "iter_0000004" / "rank0.safetensors").read_bytes() == b"new"


def test_a_model_that_changed_there_comes_again(store, tmp_path):
    """Of the same size: what the store says of a file counts, and only a change brings it again."""
    url = f"s3://{BUCKET}/h"
    store.pipe_file(f"{BUCKET}/h/model.safetensors", b"one")
    found = remote.fetch(url) / "model.safetensors"
    stamp = found.stat().st_ino
    assert remote.fetch(url) / found.name == found and found.stat().st_ino == stamp
    store.pipe_file(f"{BUCKET}/h/model.safetensors", b"two")
    assert (remote.fetch(url) / found.name).read_bytes() == b"two"


def test_what_is_old_goes_and_its_failures_are_not_the_saves(store, tmp_path, monkeypatch, caplog):
    url, here = f"s3://{BUCKET}/i", tmp_path / "here"
    store.pipe_file(f"{BUCKET}/i/iter_0000001/rank0.safetensors", b"of an upload that was killed")
    remote.upload(make(here, 2), url, keep_last=2)
    assert not store.exists(f"{BUCKET}/i/iter_0000001")
    remote.upload(make(here, 3), url, keep_last=2)

    def refuse(*_, **__):
        raise PermissionError("Access Denied")

    with monkeypatch.context() as patch, caplog.at_level("WARNING", logger="megatron_vlm"):
        patch.setattr(store, "rm", refuse)
        patch.setattr(
            remote.Store, "remove", lambda self, name: self._try("removing", refuse) if "2/" in name else None
        )
        remote.upload(make(here, 4), url, keep_last=2)
    assert f"old checkpoints of {url} stay: removing failed 4 times" in caplog.text
    assert remote.iterations(url) == [2, 3, 4]


def test_a_store_that_does_not_answer_is_not_a_damaged_checkpoint(store, tmp_path, monkeypatch):
    """An older iteration in its place would lose the work since."""
    url, here = f"s3://{BUCKET}/j", tmp_path / "here"
    for iteration in (1, 2):
        remote.upload(make(here, iteration), url, None)
    real = store.get_file

    def refuse(there, path, **options):
        if "2/rank0" in there:
            raise ConnectionError("reset")
        return real(there, path, **options)

    monkeypatch.setattr(store, "get_file", refuse)
    with pytest.raises(
        CheckpointError, match=r"iter_0000002/rank0.safetensors failed 4 times, the last with Connection"
    ):
        remote.fetch(url)
