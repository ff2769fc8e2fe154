"""What may lie in a model folder, and what is carried out of it."""

import os
import shutil
import socket
import time

import pytest
from safetensors.torch import save_file
from torch import ones

from megatron_vlm.cli.convert import main
from megatron_vlm.conversion.convert import hf2mg
from megatron_vlm.errors import ConversionError
from megatron_vlm.testing.twins.internlm2 import write_tiny_internlm2
from megatron_vlm.weights.model_folder import CarriedFiles, check_model_folder, copy_hf_files, hf_files


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """A tiny text model."""
    folder = tmp_path_factory.mktemp("twin")
    write_tiny_internlm2(folder)
    return folder


@pytest.fixture
def model(twin, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(twin, tmp_path / "model")


def bind(path):
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def in_place(path, make):
    path.unlink(missing_ok=True)
    make(path)


BAD = {
    "a pipe": ("notes.txt", os.mkfifo, "neither a file nor a folder"),
    "a pipe as config": ("config.json", os.mkfifo, "config.json"),
    "a pipe as weights": ("model.safetensors", os.mkfifo, "model.safetensors"),
    "a pipe as tokenizer": ("tokenizer.model", os.mkfifo, "tokenizer.model"),
    "a socket": ("sock", bind, "neither a file nor a folder"),
    "a device": ("vocab.txt", lambda path: path.symlink_to("/dev/zero"), "vocab.txt"),
    "a device as config": ("config.json", lambda path: path.symlink_to("/dev/zero"), "config.json"),
    "a link to itself": ("loop", lambda path: path.symlink_to("loop"), "loop: Too many levels"),
    "a link to nothing": ("gone.json", lambda path: path.symlink_to("nowhere"), "gone.json is a link to nothing"),
    "a link to the folder": ("sub", lambda path: path.symlink_to("."), "sub is a link to a folder that it lies in"),
    "a link to the folder above": ("sub", lambda path: path.symlink_to(".."), "sub is a link"),
    "a secret": ("notes.txt", lambda path: path.symlink_to("/etc/passwd"), "notes.txt is a link out of .*/etc/passwd"),
    "a secret as config": ("extra.json", lambda path: path.symlink_to("../secret"), "extra.json is a link out of"),
    "somebody's folder": ("etc", lambda path: path.symlink_to("/etc"), "etc is a link out of"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_has_no_place_in_a_model_folder_is_named(model, tmp_path, case, capsys):
    (tmp_path / "secret").write_text("{}")
    name, make, words = BAD[case]
    in_place(model / name, make)
    began = time.monotonic()
    assert main(["hf2mg", "--hf", str(model), "--out", str(tmp_path / "mg")]) == 1
    assert time.monotonic() - began < 10
    error = capsys.readouterr().err
    assert "Traceback" not in error and name in error
    with pytest.raises(ConversionError, match=words):
        check_model_folder(model) if "as " not in case or "secret" in case else hf2mg(model, tmp_path / "mg")
    assert not (tmp_path / "mg").exists()


def test_two_folders_that_link_to_each_other_end(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / "model" / name).mkdir(parents=True)
        (tmp_path / "model" / name / "to").symlink_to(f"../{other}")
    with pytest.raises(ConversionError, match="is a link to a folder that it lies in"):
        check_model_folder(tmp_path / "model")
    deep = tmp_path / "deep" / "/".join("d" * 40)
    deep.mkdir(parents=True)
    with pytest.raises(ConversionError, match="too many files and folders"):
        check_model_folder(tmp_path / "deep")


def test_links_that_users_and_the_hub_make_are_followed(tmp_path):
    store, model = tmp_path / "store", tmp_path / "mine"
    store.mkdir()
    model.mkdir()
    (store / "tokenizer.json").write_text("{}")
    save_file({"x": ones(1)}, store / "weights-of-step-5")
    (model / "tokenizer.json").symlink_to(store / "tokenizer.json")
    (model / "model.safetensors").symlink_to(store / "weights-of-step-5")
    (model / "notes.txt").write_text("mine")
    (model / "again.xyz").symlink_to("notes.txt")  # inside
    assert [str(path) for path in hf_files(model)] == ["again.xyz", "notes.txt", "tokenizer.json"]

    cache = tmp_path / "hub" / "models--org--name"
    snapshot = cache / "snapshots" / "0123abcd"
    (snapshot / "processor").mkdir(parents=True)
    (cache / "blobs").mkdir()
    for name, blob in (("config.json", "aa"), ("processor/notes.xyz", "bb")):
        (cache / "blobs" / blob).write_text(name)
        (snapshot / name).symlink_to(os.path.relpath(cache / "blobs" / blob, (snapshot / name).parent))
    copy_hf_files(snapshot, tmp_path / "copy")
    for name in ("config.json", "processor/notes.xyz"):
        assert (tmp_path / "copy" / name).read_text() == name and not (tmp_path / "copy" / name).is_symlink()
    (snapshot / "leak.txt").symlink_to("../../../../store/tokenizer.json")
    with pytest.raises(ConversionError, match=r"leak\.txt is a link out of"):
        copy_hf_files(snapshot, tmp_path / "other")


def test_a_copy_never_lies_in_its_source(model):
    with pytest.raises(ConversionError, match="lies in"):
        copy_hf_files(model, model / "sub" / "copy")
    (model / "sub").mkdir()
    with pytest.raises(ConversionError, match="lies in"):
        copy_hf_files(model / "sub" / "..", model / "copy")


def test_carried_files_outlive_their_folder(model, tmp_path):
    (model / "assets").mkdir()
    (model / "assets" / "logo.bin2").write_bytes(b"\0\xff")
    copy_hf_files(model, tmp_path / "copied")
    carried = CarriedFiles(model)
    shutil.rmtree(model)
    carried.write(tmp_path / "carried")
    left, right = (
        {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        for folder in (tmp_path / "copied", tmp_path / "carried")
    )
    assert left == right and len(left) > 3


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json"])
def test_lfs_pointers_are_named(model, tmp_path, name):
    from megatron_vlm.testing.fuzz import LFS_POINTER

    (model / name).write_bytes(LFS_POINTER)
    with pytest.raises(Exception, match=rf"{name} is a Git LFS pointer.*lfs pull"):
        from megatron_vlm.conversion.open_source import open_source
        from megatron_vlm.data.config import DataConfig

        with open_source(model) as source:
            source.spec.processor(source.hf_dir, DataConfig(seq_length=64))


@pytest.mark.parametrize("place", ["same", "below", "link", "above"])
@pytest.mark.parametrize("direction", ["hf2mg", "mg2hf"])
def test_an_output_apart_from_its_source(model, tmp_path, direction, place, capsys):
    source, flag = model, "--hf"
    if direction == "mg2hf":
        hf2mg(model, tmp_path / "above" / "mg")
        source, flag = tmp_path / "above" / "mg", "--load"
    (tmp_path / "link").symlink_to(source)
    out = {"same": source, "below": source / "a" / "b", "link": tmp_path / "link" / "c", "above": source.parent}[place]
    before = sorted(tmp_path.rglob("*"))
    assert main([direction, flag, str(source), "--out", str(out)]) == 1
    words = {"same": "is the folder", "above": "holds the folder"}.get(place, "lies in the folder")
    assert words in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_dead_process_of_the_same_number_left_does_not_block(model, tmp_path):
    """In containers every command has the same process id: the name of the folder that it writes must differ all the same."""
    from megatron_vlm.files import _host

    old = [tmp_path / f".mg.{os.getpid()}.tmp", tmp_path / f".mg.{_host()}.{os.getpid()}.tmp"]
    dead = tmp_path / f".mg.{_host()}.999999999.0123abcd.tmp"
    for folder in (*old, dead):
        (folder / "mp_rank_00_000").mkdir(parents=True)
    assert main(["hf2mg", "--hf", str(model), "--out", str(tmp_path / "mg")]) == 0
    assert (tmp_path / "mg" / "megatron.json").is_file() and not dead.exists()
