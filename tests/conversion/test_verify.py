"""``verify`` passes what is equal, in any layout, and sees a wrong bit, a wrong config and a wrong computation."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.cli.convert import main
from megatron_vlm.conversion import verify as verify_module
from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.conversion.verify import verify
from megatron_vlm.digests import sealed
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.testing.distributed import run_distributed
from megatron_vlm.testing.twins.idefics2 import write_tiny_idefics2


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """name -> HF directory."""
    root = tmp_path_factory.mktemp("twins")
    write_tiny_idefics2(root / "mistral", sliding_window=11)
    write_tiny_idefics2(root / "llama", text="llama", tie=True)
    return root


def run_verify(*args, **options):
    """On a rank: the report of ``verify``."""
    report = verify(*args, **options)
    return report.passed, report.level, "\n".join(report.lines)


@pytest.mark.parametrize("twin, tp, pp", [("mistral", 2, 2), ("llama", 4, 1)])
def test_a_conversion_passes_at_the_highest_level(twins, tmp_path, twin, tp, pp):
    hf2mg(twins / twin, tmp_path / "mg", tp=tp, pp=pp)
    ((passed, level, text),) = run_distributed(run_verify, twins / twin, tmp_path / "mg")
    assert passed and level == "full", text
    assert "the highest that fits" in text and "DIFFERS" not in text
    for module in ("vision_model.encoder.layers.2", "connector.perceiver_resampler.layers.1", "logits", "loss"):
        assert f"\n{module}" in text, module


def test_cast_weights_are_compared_after_the_cast(twins, tmp_path):
    hf2mg(twins / "mistral", tmp_path / "mg", tp=2, dtype="bf16")
    ((passed, _, text),) = run_distributed(run_verify, twins / "mistral", tmp_path / "mg", level="forward")
    assert passed and "float32 -> bfloat16" in text, text


def test_an_export_is_verified_too_and_the_last_line_says_how_equal_it_is(twins, tmp_path, capsys):
    hf2mg(twins / "mistral", tmp_path / "mg", tp=2)
    words = ["verify", "--hf", str(twins / "mistral"), "--level", "weights", "--load"]
    for dtype, said in (
        (None, "equal bit for bit"),
        ("fp16", "equal to HF's rounded to float16, which changes values by up to "),
    ):
        out = tmp_path / f"hf_{dtype}"
        mg2hf(tmp_path / "mg", out, dtype=dtype)
        assert main([*words, str(out)]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith(f"verify weights: passed, weights {said}"), last
    exact, rounded = (load_file(folder / "model.safetensors") for folder in (twins / "mistral", out))
    largest = max(float((exact[name].double() - rounded[name].double()).abs().max()) for name in rounded)
    assert last.endswith(f" {largest:.2g}") and largest > 0
    # What was widened holds every value of HF's.
    half = ["verify", "--hf", str(out), "--level", "weights", "--load"]
    mg2hf(out, tmp_path / "wide", dtype="fp32")
    assert main([*half, str(tmp_path / "wide")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("weights equal, every value of HF's is one of float32")


def changed_copy(source, directory, change):
    shutil.copytree(source, directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return directory


def one_bit(tensors):
    tensors["lm_head.weight"].view(torch.int32)[7, 3] ^= 1


def swapped(tensors):
    name = "model.text_model.layers.{}.self_attn.q_proj.weight"
    tensors[name.format(0)], tensors[name.format(1)] = tensors[name.format(1)], tensors[name.format(0)]


@pytest.mark.parametrize(
    "change, words, modules",
    [
        (one_bit, ["lm_head.weight: 1 of", "language_model.output_layer"], 1),
        (swapped, ["layers.0.self_attn.q_proj.weight", "language_model.decoder.layers.1"], 2),
    ],
)
def test_wrong_weights_fail_and_are_named(twins, tmp_path, capsys, change, words, modules):
    changed = changed_copy(twins / "mistral", tmp_path / "changed", change)
    hf2mg(changed, tmp_path / "mg", tp=2)
    assert main(["verify", "--hf", str(twins / "mistral"), "--load", str(tmp_path / "mg"), "--level", "full"]) == 1
    text = capsys.readouterr().out
    assert all(word in text for word in words), text
    assert "DIFFERS" in text and "verify full: FAILED" in text and "left out" in text
    assert text.count("DIFFERS") == modules


def test_bits_count_not_values(twins, tmp_path):
    def zero(tensors, value):
        tensors["lm_head.weight"][7, 3] = value

    plus = changed_copy(twins / "mistral", tmp_path / "plus", lambda tensors: zero(tensors, 0.0))
    minus = changed_copy(twins / "mistral", tmp_path / "minus", lambda tensors: zero(tensors, -0.0))
    assert verify(plus, plus, level="weights").passed
    assert not verify(plus, minus, level="weights").passed


def test_another_config_fails(twins, tmp_path, capsys):
    hf2mg(twins / "mistral", tmp_path / "mg")
    path = tmp_path / "mg" / "hf" / "config.json"
    text = path.read_text()
    assert '"sliding_window": 11' in text
    path.write_text(text.replace('"sliding_window": 11', '"sliding_window": 12'))
    assert not verify(twins / "mistral", tmp_path / "mg", level="weights").passed
    assert "text_config.sliding_window 11 -> 12" in capsys.readouterr().out


def test_changed_files_fail(twins, tmp_path, capsys):
    hf2mg(twins / "mistral", tmp_path / "mg")
    path = tmp_path / "mg" / "megatron.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["mp_rank_00_000/model.safetensors"]["sha256"] = "0" * 64
    path.write_text(json.dumps(sealed({key: value for key, value in manifest.items() if key != "digest"})))
    assert not verify(twins / "mistral", tmp_path / "mg", level="weights").passed
    assert "was changed: its sha256" in capsys.readouterr().out


def test_the_level_follows_memory(twins, tmp_path, monkeypatch, capsys):
    hf2mg(twins / "mistral", tmp_path / "mg")
    monkeypatch.setattr(verify_module, "available_memory", lambda: 10**8)
    report = verify(twins / "mistral", tmp_path / "mg")
    assert report.passed and report.level == "weights"
    assert "forward would need about" in capsys.readouterr().out


def test_what_cannot_be_compared(twins, tmp_path):
    hf2mg(twins / "mistral", tmp_path / "mg")
    with pytest.raises(ConversionError, match="swap --hf and --load"):
        verify(tmp_path / "mg", twins / "mistral")
    with pytest.raises(ConfigError, match=r"unknown level 'forwards' .did you mean 'forward'"):
        verify(twins / "mistral", tmp_path / "mg", level="forwards")
    assert main(["verify", "--hf", str(twins / "llama"), "--load", str(tmp_path / "mg")]) == 1
