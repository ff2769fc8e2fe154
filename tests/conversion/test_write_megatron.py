"""What Megatron weights hold, and where; layouts that do not divide are refused before anything is written."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.errors import ConfigError
from megatron_vlm.testing.twins.model_folders import assert_same_model


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


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tp=3), "tensor parallel size 3 .*32 heads.*use one of 1, 2, 4, 8, 16, 32"),
        (dict(tp=0), "tensor parallel size 0"),
        (dict(pp=3), "pipeline parallel size 3 for 2 decoder layers: use 1 to 2"),
        (dict(vocab_multiple=0), "make-vocab-size-divisible-by"),
        (dict(dtype="int8"), "'int8' is not one of"),
    ],
)
def test_layouts_that_do_not_divide(twins, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        hf2mg(twins("mistral"), tmp_path / "mg", **options)
    assert list(tmp_path.iterdir()) == []
