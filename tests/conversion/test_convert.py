"""HF -> Megatron weights -> HF gives back every tensor bit for bit, in every layout; what cannot work says why."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.cli.convert import main
from megatron_vlm.conversion.convert import export_hf, hf2mg, mg2hf
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.sources.megatron import MegatronSource
from megatron_vlm.testing.twins import write_tiny_idefics2

ROOT = Path(__file__).parents[2]
# The head counts of the real models: decoder 32 and 8 kv, tower 16, perceiver 16 and 4 kv.
REAL_HEADS = dict(
    heads=32, kv_heads=8, layers=2, vision_heads=16, vision_layers=2, vision_ffn=80, perceiver_heads=16,
    perceiver_kv_heads=4, perceiver_head_dim=8,
)  # fmt: skip
TWINS = {
    "mistral": ("idefics2", dict(text="mistral", sliding_window=7)),
    "mistral_tied": ("idefics2", dict(text="mistral", tie=True)),
    "llama": ("idefics2_llama3", dict(text="llama", max_shard_size="100KB")),
    "llama_tied": ("idefics2_llama3", dict(text="llama", tie=True, dtype=torch.bfloat16)),
}


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    """name -> HF directory."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            write_tiny_idefics2(made[name], **TWINS[name][1], **REAL_HEADS)
        return made[name]

    return make


def tensors_of(directory):
    return {name: t for shard in sorted(directory.glob("*.safetensors")) for name, t in load_file(shard).items()}


def assert_same_model(left, right, files=True):
    a, b = tensors_of(left), tensors_of(right)
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
    if files:
        for path in left.iterdir():
            if "safetensors" not in path.name:
                assert (right / path.name).read_bytes() == path.read_bytes(), path.name
        assert {p.name for p in left.iterdir() if "safetensors" not in p.name} == {
            p.name for p in right.iterdir() if "safetensors" not in p.name
        }


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


def test_stages_hold_what_they_should(twins, tmp_path):
    hf2mg(twins("llama_tied"), tmp_path / "mg", tp=1, pp=2)
    first, last = (set(load_file(tmp_path / "mg" / f"mp_rank_00_00{p}" / "model.safetensors")) for p in (0, 1))
    decoder = "language_model.decoder."
    assert {name.split(".")[3] for name in first if name.startswith(decoder + "layers.")} == {"0"}
    assert {n for n in last if not n.startswith(decoder + "layers.1.")} == {decoder + "final_layernorm.weight"}
    assert {n.split(".")[0] for n in first} == {"vision_model", "connector", "language_model"}
    assert "language_model.embedding.word_embeddings.weight" in first


def test_manifest(twins, tmp_path):
    import hashlib

    hf2mg(twins("mistral"), tmp_path / "mg", tp=2, pp=1, vocab_multiple=8, vocab_extra=11)
    manifest = json.loads((tmp_path / "mg" / "megatron.json").read_text())
    rows = manifest["vocab_size"]
    assert (manifest["family"], manifest["tensor_model_parallel_size"]) == ("idefics2", 2)
    assert manifest["padded_vocab_size"] == -(-(rows + 11) // 16) * 16
    on_disk = {str(p.relative_to(tmp_path / "mg")) for p in (tmp_path / "mg").rglob("*") if p.is_file()}
    assert on_disk == {*manifest["files"], "megatron.json"}
    for name, entry in manifest["files"].items():
        data = (tmp_path / "mg" / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    shards = [load_file(tmp_path / "mg" / f"mp_rank_0{t}_000" / "model.safetensors") for t in (0, 1)]
    for name in ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"):
        full = torch.cat([shard[name] for shard in shards])
        assert len(full) == manifest["padded_vocab_size"] and not full[rows:].any()
    mg2hf(tmp_path / "mg", tmp_path / "hf")
    assert_same_model(twins("mistral"), tmp_path / "hf")


def edited(source, tmp_path, change=lambda tensors: None, config=lambda config: None):
    """A copy of an HF directory with other tensors or another config, in one file."""
    directory = tmp_path / "edited"
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*safetensors*"))
    tensors = tensors_of(source)
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    data = json.loads((directory / "config.json").read_text())
    config(data)
    (directory / "config.json").write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
    return directory


def test_a_stored_tied_head_is_written_again(twins, tmp_path, caplog):
    embedding = "model.text_model.embed_tokens.weight"
    source = edited(twins("llama_tied"), tmp_path, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    hf2mg(source, tmp_path / "mg", tp=2, pp=2)
    mg2hf(tmp_path / "mg", tmp_path / "hf")
    assert_same_model(source, tmp_path / "hf", files=False)
    assert "lm_head.weight" in tensors_of(tmp_path / "hf")
    assert_loads_in_silence(tmp_path / "hf", caplog)


def test_a_tied_head_that_differs_is_refused(twins, tmp_path):
    embedding = "model.text_model.embed_tokens.weight"
    source = edited(twins("llama_tied"), tmp_path, lambda t: t.update({"lm_head.weight": t[embedding] + 1}))
    with pytest.raises(ConversionError, match="tie_word_embeddings"):
        open_source(source)


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


def test_shards_are_read_directly_or_merged(twins, tmp_path):
    hf2mg(twins("mistral"), tmp_path / "mg", tp=2, vocab_multiple=8)
    with open_source(twins("mistral")) as hf, open_source(tmp_path / "mg") as megatron:
        assert list(hf.infos) == list(megatron.infos) and megatron.kind == "megatron"
        for tp, multiple in ((2, 8), (2, 1), (4, 8), (1, 8)):
            for entry in hf.spec.mapping(hf.config, tp=tp).padded(multiple):
                for rank in range(tp):
                    shard = megatron.read_shard(entry.name, entry.split, tp, rank)
                    assert torch.equal(shard, hf.read_shard(entry.name, entry.split, tp, rank)), entry.name
                assert (
                    megatron.infos[entry.name].shape == hf.infos[entry.name].shape == tuple(hf.read(entry.name).shape)
                )


def missing(tensors):
    del tensors["model.connector.perceiver_resampler.latents"]


def unmapped(tensors):
    tensors["model.extra.weight"] = torch.zeros(1)


def wrong_rows(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()


def wrong_heads(tensors):
    name = "model.text_model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name][: len(tensors[name]) // 2].clone()


def mixed_dtypes(tensors):
    name = "model.text_model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].half()


@pytest.mark.parametrize(
    "change, message",
    [
        (missing, r"1 tensors missing: model\.connector\.perceiver_resampler\.latents"),
        (unmapped, r"1 tensors unmapped: model\.extra\.weight"),
        (wrong_rows, r"lm_head\.weight .*config\.json says a vocabulary"),
        (wrong_heads, r"shapes do not fit.*layers\.1\.self_attention\.linear_qkv"),
        (mixed_dtypes, r"different dtypes: .*up_proj\.weight torch\.float16"),
    ],
)
def test_tensors_that_do_not_fit_are_named(twins, tmp_path, change, message):
    with pytest.raises(ConversionError, match=message):
        open_source(edited(twins("mistral"), tmp_path, change))


def test_buffers_of_old_versions_are_left_out(twins, tmp_path):
    name = "model.vision_model.embeddings.position_ids"
    with open_source(edited(twins("mistral"), tmp_path, lambda t: t.update({name: torch.arange(4)}))) as source:
        export_hf(source, tmp_path / "hf")
    assert_same_model(twins("mistral"), tmp_path / "hf", files=False)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tp=3), "tensor parallel size 3 .*32 heads.*use one of 1, 2, 4, 8, 16, 32"),
        (dict(tp=0), "tensor parallel size 0"),
        (dict(pp=3), "pipeline parallel size 3 does not divide 2 decoder layers: use one of 1, 2"),
        (dict(vocab_multiple=0), "make-vocab-size-divisible-by"),
        (dict(dtype="int8"), "'int8' is not one of"),
    ],
)
def test_layouts_that_do_not_divide(twins, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        hf2mg(twins("mistral"), tmp_path / "mg", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_family_of_one_layout_offers_no_other(twins, tmp_path):
    with pytest.raises(ConfigError, match=r"^--as chat: family idefics2 has one layout alone: leave --as out$"):
        mg2hf(twins("mistral"), tmp_path / "hf", naming="chat")


def test_wrong_family(twins, tmp_path):
    with pytest.raises(ConversionError, match=r"family idefics2 .*'mistral'.*not idefics2_llama3"):
        open_source(twins("mistral"), "idefics2_llama3")
    with open_source(twins("llama"), "idefics2") as source:  # idefics2 reads any text model
        assert source.spec.name == "idefics2_llama3"
    other = edited(twins("mistral"), tmp_path, config=lambda config: config.update(model_type="bert"))
    with pytest.raises(ConversionError, match="no model family reads model_type 'bert'"):
        open_source(other)
    with pytest.raises(ConfigError, match=r"unknown model family 'idefics' .did you mean 'idefics2'"):
        open_source(twins("mistral"), "idefics")


def test_damaged_megatron_weights_are_named(twins, tmp_path):
    good = tmp_path / "good"
    hf2mg(twins("mistral"), good, tp=2)
    file = "mp_rank_01_000/model.safetensors"

    def damaged(name):
        return Path(shutil.copytree(good, tmp_path / name))

    bad = damaged("truncated")
    (bad / file).write_bytes((good / file).read_bytes()[:-1])
    with pytest.raises(ConversionError, match=r"mp_rank_01_000/model\.safetensors has .* truncated"):
        open_source(bad)
    bad = damaged("absent")
    shutil.rmtree(bad / "mp_rank_01_000")
    with pytest.raises(ConversionError, match=r"mp_rank_01_000/model\.safetensors is missing"):
        open_source(bad)
    bad = damaged("flipped")
    data = bytearray((good / file).read_bytes())
    data[-5] ^= 1
    (bad / file).write_bytes(data)
    with pytest.raises(ConversionError, match=r"changed: its sha256|replicated tensor differs"):
        mg2hf(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    bad = damaged("other_version")
    (bad / "megatron.json").write_text(json.dumps(json.loads((good / "megatron.json").read_text()) | {"version": 9}))
    with pytest.raises(ConversionError, match="version 9"):
        open_source(bad)
    bad = damaged("replica")
    shard = load_file(bad / file)
    shard["connector.perceiver_resampler.latents"] += 1
    save_file(shard, bad / file)
    manifest = json.loads((bad / "megatron.json").read_text())
    manifest["files"][file]["size"] = (bad / file).stat().st_size
    (bad / "megatron.json").write_text(json.dumps(manifest))
    with MegatronSource(bad) as source, pytest.raises(ConversionError, match="latents: replicated tensor differs"):
        source.read("connector.perceiver_resampler.latents")


def test_neither_one_nor_the_other(tmp_path):
    with pytest.raises(
        ConversionError, match=r"neither an HF model .*nor Megatron weights .*nor a training checkpoint"
    ):
        open_source(tmp_path)


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
