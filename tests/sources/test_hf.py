"""HF models as sources: what does not fit is named, buffers and ties are known, any naming is read through the full tensor."""

import pytest
import torch

from megatron_vlm.conversion.convert import export_hf
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.errors import ConversionError
from megatron_vlm.testing.twins.internlm2 import write_tiny_internlm2
from megatron_vlm.testing.twins.model_folders import edited, tensors_of


def test_a_tied_head_that_differs_is_refused(twins, tmp_path):
    embedding = "model.text_model.embed_tokens.weight"
    source = edited(twins("llama_tied"), tmp_path, lambda t: t.update({"lm_head.weight": t[embedding] + 1}))
    with pytest.raises(ConversionError, match="tie_word_embeddings"):
        open_source(source)


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
    kept, written = tensors_of(twins("mistral")), tensors_of(tmp_path / "hf")
    assert kept.keys() == written.keys() and all(torch.equal(kept[name], written[name]) for name in kept)


def test_hf_tensors_are_read_under_any_naming(tmp_path):
    write_tiny_internlm2(tmp_path)
    with open_source(tmp_path) as source:
        stored, other = tensors_of(tmp_path), source.spec.exports["llama"].mapping(source.config)
        for own, entry in zip(source.mapping, other, strict=True):
            assert [torch.equal(torch.cat(p), stored[hf]) for hf, p in zip(own.hf, source.read_hf(own))] == [
                True
            ] * len(own.hf)
            parts = [torch.cat(pieces) for pieces in source.read_hf(entry)]
            assert torch.equal(entry.to_full(parts), source.read(entry.name)), entry.name
        assert source.file_names()[0] == "model.safetensors" and "config.json" in source.file_names()
