"""HF -> Megatron weights -> HF gives back every tensor bit for bit, in every layout; what cannot work says why."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_vlm.cli.convert import main
from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.errors import ConversionError
from megatron_vlm.testing.twins.model_folders import TWINS, assert_same_model, edited, tensors_of

ROOT = Path(__file__).parents[2]


def assert_loads_in_silence(directory, caplog):
    from transformers import Idefics2ForConditionalGeneration
    from transformers.utils import logging as hf_logging

    hf_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        _, info = Idefics2ForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    hf_logging.disable_propagation()
    assert not any(info.values()), info
    assert not caplog.records, caplog.text


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("twin", TWINS)
def test_round_trip(twins, tmp_path, caplog, twin, tp, pp):
    source, family = twins(twin), TWINS[twin][0]
    hf2mg(source, tmp_path / "mg", family=family, tp=tp, pp=pp)
    assert sorted(p.name for p in (tmp_path / "mg").glob("mp_rank_*")) == [
        f"mp_rank_{t:02d}_{p:03d}" for t in range(tp) for p in range(pp)
    ]
    mg2hf(tmp_path / "mg", tmp_path / "hf", max_shard_size="50KB")
    assert_same_model(source, tmp_path / "hf")
    if (tp, pp) in ((1, 1), (8, 2)):
        assert_loads_in_silence(tmp_path / "hf", caplog)


def test_a_layout_converts_to_another(twins, tmp_path):
    hf2mg(twins("mistral"), tmp_path / "a", tp=4, pp=2)
    hf2mg(tmp_path / "a", tmp_path / "b", tp=2, pp=1)
    hf2mg(twins("mistral"), tmp_path / "c", tp=2, pp=1)
    for path in sorted((tmp_path / "c").glob("mp_rank_*/*")):
        assert (tmp_path / "b" / path.relative_to(tmp_path / "c")).read_bytes() == path.read_bytes()


def test_a_stored_tied_head_is_written_again(twins, tmp_path, caplog):
    embedding = "model.text_model.embed_tokens.weight"
    source = edited(twins("llama_tied"), tmp_path, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    hf2mg(source, tmp_path / "mg", tp=2, pp=2)
    mg2hf(tmp_path / "mg", tmp_path / "hf")
    assert_same_model(source, tmp_path / "hf", files=False)
    assert "lm_head.weight" in tensors_of(tmp_path / "hf")
    assert_loads_in_silence(tmp_path / "hf", caplog)


def test_each_tensor_keeps_its_dtype(twins, tmp_path):
    def mix(tensors):
        for name in tensors:
            if "text_model" in name:
                tensors[name] = tensors[name].bfloat16()

    source = edited(twins("mistral"), tmp_path, mix)
    hf2mg(source, tmp_path / "mg", tp=2)
    mg2hf(tmp_path / "mg", tmp_path / "hf")
    assert_same_model(source, tmp_path / "hf", files=False)


@pytest.mark.parametrize("step", ["hf2mg", "mg2hf"])
def test_dtype_casts_tensors_and_config(twins, tmp_path, step):
    hf2mg(twins("mistral"), tmp_path / "mg", tp=2, dtype="bf16" if step == "hf2mg" else None)
    mg2hf(tmp_path / "mg", tmp_path / "hf", dtype="bf16" if step == "mg2hf" else None)
    original, result = tensors_of(twins("mistral")), tensors_of(tmp_path / "hf")
    assert all(torch.equal(result[name], tensor.bfloat16()) for name, tensor in original.items())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_output_that_exists_stops_before_reading(twins, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConversionError, match="not empty"):
        hf2mg(twins("mistral"), tmp_path)


def test_command_line(twins, tmp_path, capsys):
    out = str(tmp_path / "mg")
    assert main(["hf2mg", "--family", "idefics2", "--hf", str(twins("mistral")), "--out", out, "--tp", "2"]) == 0
    assert main(["mg2hf", "--load", out, "--out", str(tmp_path / "hf")]) == 0
    assert_same_model(twins("mistral"), tmp_path / "hf")
    capsys.readouterr()  # transformers' bar, where this test is the first to write the twin
    assert main(["mg2hf", "--load", out, "--out", str(tmp_path / "hf")]) == 1
    assert (
        capsys.readouterr().err
        == f"error: --out {tmp_path / 'hf'} exists and is not empty: remove it, or choose another directory\n"
    )
    assert main(["hf2mg", "--out", out]) == 1
    assert "--hf DIR, or both --llm DIR and --vision DIR" in capsys.readouterr().err
    assert main(["hf2mg", "--hf", "x", "--out", out, "--image-size", "980"]) == 1
    assert "--image-size" in capsys.readouterr().err


def test_the_executable_runs_from_anywhere(twins, tmp_path):
    command = [str(ROOT / "toolkits" / "convert"), "hf2mg", "--hf", "gone", "--out", str(tmp_path / "mg")]
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (
        1,
        "error: gone does not exist: give a model directory, or a hub id such as HuggingFaceM4/idefics2-8b\n",
    )
