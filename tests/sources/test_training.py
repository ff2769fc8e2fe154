"""A training checkpoint of any layout exports to the HF model it holds; damaged ones are named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlm.cli.convert import main
from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.errors import CheckpointError
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2
from megatron_vlm.weights.checkpoint_dir import newest
from megatron_vlm.weights.model_folder import CarriedFiles

TRACKER = "latest_checkpointed_iteration.txt"


def save(hf_dir, root, parallel, dtype):
    """On a rank: the weights of ``hf_dir``, doubled, as iteration 3."""
    from megatron_vlm.testing.parity import build_for_test
    from megatron_vlm.training.checkpoint.config import CheckpointConfig
    from megatron_vlm.training.checkpoint.save import Origin, save_checkpoint
    from megatron_vlm.training.optimizer.build import wrap_model

    _, source, model, config = build_for_test(hf_dir, parallel, {"params_dtype": dtype})
    model = wrap_model(model, config)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            parameter.mul_(2)
    where, origin = CheckpointConfig(save=root, no_save_optim=True), Origin(hf_files=CarriedFiles(source.hf_dir))
    save_checkpoint(where, model, None, {"iteration": 3}, origin)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(HF directory, checkpoint root): Llama with a tied head, tp 2, pp 2."""
    root = tmp_path_factory.mktemp("saved")
    write_tiny_idefics2(root / "hf", text="llama", tie=True)
    parallel = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    run_distributed(save, str(root / "hf"), str(root / "run"), parallel, "fp32", tp=2, pp=2)
    return root / "hf", root / "run"


def assert_doubled(hf, out):
    before, after = load_file(hf / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], 2 * tensor) for name, tensor in before.items())


@pytest.mark.parametrize("folder", ["", "iter_0000003"])
def test_export(saved, tmp_path, folder):
    hf, run = saved
    mg2hf(run / folder, tmp_path / "out")
    assert_doubled(hf, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (hf / "config.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()


def test_config_says_the_dtype_that_was_trained(tmp_path):
    write_tiny_idefics2(tmp_path / "hf")
    run_distributed(save, str(tmp_path / "hf"), str(tmp_path / "run"), {}, "bf16")
    mg2hf(tmp_path / "run", tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_tracker_that_says_release(saved, tmp_path):
    hf, run = saved
    shutil.copytree(run / "iter_0000003", tmp_path / "a" / "release")
    (tmp_path / "a" / TRACKER).write_text("release\n")
    mg2hf(tmp_path / "a", tmp_path / "out")
    assert_doubled(hf, tmp_path / "out")
    # Megatron weights under that name, as older converters leave them.
    hf2mg(run, tmp_path / "b" / "release", tp=2)
    (tmp_path / "b" / TRACKER).write_text("release")
    with open_source(tmp_path / "b") as source:
        assert source.kind == "megatron"


def test_damaged_checkpoints_are_named(saved, tmp_path):
    _, run = saved
    for name in ("cut", "flipped", "no_manifest", "no_rank"):
        shutil.copytree(run, tmp_path / name)
    file = "iter_0000003/rank1.safetensors"
    path = tmp_path / "cut" / file
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"rank1\.safetensors has .* bytes, manifest\.json says"):
        open_source(tmp_path / "cut")
    path = tmp_path / "flipped" / file
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert main(["mg2hf", "--load", str(tmp_path / "flipped"), "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()
    (tmp_path / "no_manifest" / "iter_0000003" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        open_source(tmp_path / "no_manifest")
    (tmp_path / "no_rank" / file).unlink()
    with pytest.raises(CheckpointError, match=r"rank1\.safetensors is missing"):
        open_source(tmp_path / "no_rank")


def test_the_newest_sound_one_is_taken_as_training_takes_it(saved, tmp_path, capsys):
    hf, run = saved
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(run / "iter_0000003", tmp_path / "run" / "iter_0000006")
    with open_source(tmp_path / "run") as source:
        assert source.directory.name == newest(tmp_path / "run").name == "iter_0000006"
    path = tmp_path / "run" / "iter_0000006" / "hf" / "config.json"
    path.write_text(path.read_text().replace("1", "2"))
    path = tmp_path / "run" / "iter_0000006" / "rank1.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert newest(tmp_path / "run").name == "iter_0000003"
    assert main(["mg2hf", "--load", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert_doubled(hf, tmp_path / "out")
    assert "iter_0000006 cannot be loaded, trying the one before it" in capsys.readouterr().out


def test_a_tracker_that_names_another_is_told_of(saved, tmp_path, capsys):
    _, run = saved
    shutil.copytree(run, tmp_path / "run")
    for text in ("4", "latest"):
        (tmp_path / "run" / TRACKER).write_text(text)
        with open_source(tmp_path / "run") as source:
            assert source.directory.name == "iter_0000003"
        assert main(["mg2hf", "--load", str(tmp_path / "run"), "--out", str(tmp_path / f"out{text}")]) == 0
        assert (
            f"says {text!r}, but the newest sound checkpoint there is iter_0000003: taking that"
            in capsys.readouterr().out
        )
    shutil.rmtree(tmp_path / "run" / "iter_0000003")
    with pytest.raises(CheckpointError, match="'latest', neither an iteration nor 'release'"):
        open_source(tmp_path / "run")
