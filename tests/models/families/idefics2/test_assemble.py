"""An Llama 3 and a SigLIP become an Idefics2 that transformers loads; the base variant gets its end-of-turn token."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.conversion.convert import export_hf, hf2mg, mg2hf, open_model
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.testing.twins.common import randomise
from megatron_vlm.testing.twins.idefics2 import tiny_tokenizer, write_tiny_idefics2

ADDED = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
PERCEIVER = dict(
    resampler_n_latents=5, resampler_depth=2, resampler_n_heads=4, resampler_head_dim=16, num_key_value_heads=2
)
EMBEDDING, HEAD = "model.text_model.embed_tokens.weight", "lm_head.weight"
POSITIONS = "model.vision_model.embeddings.position_embedding.weight"


def llama_tokenizer(*, pad=True):
    """A tokenizer as Llama 3 has: no padding token, reserved ones, no image tokens."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    data = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < 3]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), bos_token="<s>", eos_token="</s>"
    )
    if pad:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_special_token_0|>"]})
    return tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Directories: LLM (tied and not), SigLIP tower alone, whole SigLIP model, and one as older files are named."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        SiglipConfig,
        SiglipModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    root = tmp_path_factory.mktemp("parts")
    tokenizer = llama_tokenizer()
    for name, tie in (("llm", False), ("tied", True)):
        config = LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
            vocab_size=len(tokenizer), max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
            rope_theta=500000.0, rms_norm_eps=1e-5, tie_word_embeddings=tie,
        )  # fmt: skip
        randomise(LlamaForCausalLM(config)).save_pretrained(root / name, max_shard_size="50KB")
        tokenizer.save_pretrained(root / name)
    vision = SiglipVisionConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=8
    )
    tower = randomise(SiglipVisionModel(vision))
    tower.save_pretrained(root / "tower")
    text = dict(
        hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=99,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    whole = randomise(SiglipModel(SiglipConfig(vision_config=vision.to_dict(), text_config=text)))
    whole.save_pretrained(root / "whole")
    shutil.copytree(root / "tower", root / "prefixed")
    tensors = {
        f"vision_model.{name}": tensor for name, tensor in load_file(root / "tower" / "model.safetensors").items()
    }
    save_file(tensors, root / "prefixed" / "model.safetensors", {"format": "pt"})
    return root


def assembled(parts, out, llm="llm", vision="tower", **options):
    """Assembles, exports, and returns the tensors."""
    options = {"perceiver": PERCEIVER, **options}
    with open_model(None, family="idefics2_llama3", llm=parts / llm, vision=parts / vision, assemble=options) as source:
        export_hf(source, out)
    return load_file(out / "model.safetensors")


def source_tensors(directory):
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def test_every_part_is_where_it_belongs(parts, tmp_path):
    tensors = assembled(parts, tmp_path / "out")
    llm, tower = source_tensors(parts / "llm"), source_tensors(parts / "tower")
    rows = len(llm["lm_head.weight"])
    for name, tensor in llm.items():
        target = tensors[name if name == HEAD else "model.text_model." + name.removeprefix("model.")]
        if len(target) != len(tensor):
            assert target.shape == (rows + 3, 64)
            assert torch.equal(target[:rows], tensor)
            assert torch.allclose(target[rows:], tensor.mean(0).expand(3, -1), atol=1e-6)
        else:
            assert torch.equal(target, tensor), name
    for name, tensor in tower.items():
        if not name.startswith("head."):
            assert torch.equal(tensors["model.vision_model." + name], tensor), name
    connector = {name: tensor for name, tensor in tensors.items() if "connector" in name}
    assert len(tensors) == len(llm) + sum(not n.startswith("head.") for n in tower) + len(connector)
    for name, tensor in connector.items():
        if "norm" in name or "latents" in name:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        else:
            assert abs(tensor.std() / 0.02 - 1) < 0.1 and abs(tensor.mean()) < 2e-3, name


def test_transformers_loads_and_runs_it(parts, tmp_path):
    from PIL import Image
    from transformers import AutoProcessor, Idefics2ForConditionalGeneration

    assembled(parts, tmp_path / "out")
    model, info = Idefics2ForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    tokenizer = processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids(list(ADDED))
    rows = len(llama_tokenizer())
    assert ids == [rows, rows + 1, rows + 2] and model.config.text_config.vocab_size == rows + 3
    assert model.config.image_token_id == ids[1]
    # EOS is supervised, so padding has a token of its own.
    assert tokenizer.pad_token == "<|reserved_special_token_0|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.text_config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == [2, ids[2]]
    assert model.generation_config.bad_words_ids == [[ids[0]], [ids[1]]]
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert prompt == "User:<image>What?<end_of_utterance>\nAssistant:"
    inputs = processor(text=prompt, images=[Image.new("RGB", (40, 30), "red")], return_tensors="pt")
    assert int((inputs["input_ids"] == ids[1]).sum()) == 5
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    plain = llama_tokenizer()("What digit is this? zero one two").input_ids
    assert tokenizer("What digit is this? zero one two").input_ids == plain


@pytest.mark.parametrize("vision", ["prefixed", "whole"])
def test_other_spellings_of_the_tower(parts, tmp_path, vision):
    tensors = assembled(parts, tmp_path / "out", vision=vision)
    stored = source_tensors(parts / vision)
    for name, tensor in stored.items():
        if name.startswith("vision_model.") and "head" not in name:
            assert torch.equal(tensors["model." + name], tensor), name
    assert not any("logit" in name or "model.vision_model.head" in name for name in tensors)


def test_tied_language_model(parts, tmp_path):
    tensors = assembled(parts, tmp_path / "out", llm="tied")
    assert HEAD not in tensors
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_position_table_is_interpolated(parts, tmp_path):
    table = source_tensors(parts / "tower")["embeddings.position_embedding.weight"]
    same = assembled(parts, tmp_path / "same", image_size=56)[POSITIONS]
    assert torch.equal(same, table)
    larger = assembled(parts, tmp_path / "larger", image_size=112)
    assert larger[POSITIONS].shape == (14 * 14, 48)
    config = json.loads((tmp_path / "larger" / "config.json").read_text())
    assert config["vision_config"]["image_size"] == 112
    # A plane stays one away from the border, up to torch's choice of cubic (a = -0.75): rows are rows, no half-cell shift.
    row, column = torch.meshgrid(torch.arange(7.0), torch.arange(7.0), indexing="ij")
    plane = (3 * row + column).reshape(-1, 1).expand(-1, 48).contiguous()
    changed = tmp_path / "plane"
    shutil.copytree(parts / "tower", changed)
    tensors = source_tensors(parts / "tower") | {"embeddings.position_embedding.weight": plane}
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    grid = assembled(parts, tmp_path / "out", vision=changed, image_size=112)[POSITIONS][:, 0].reshape(14, 14)
    centre = (torch.arange(14.0) + 0.5) / 2 - 0.5
    expected = 3 * centre[:, None] + centre[None]
    assert torch.allclose(grid[4:10, 4:10], expected[4:10, 4:10], atol=0.25)


def test_the_seed_decides_what_is_drawn(parts, tmp_path):
    first = assembled(parts, tmp_path / "a", seed=1, latents="normal", new_rows="normal")
    again = assembled(parts, tmp_path / "b", seed=1, latents="normal", new_rows="normal")
    other = assembled(parts, tmp_path / "c", seed=2, latents="normal", new_rows="normal")
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == {EMBEDDING, HEAD} | {n for n in first if "connector" in n and "norm" not in n}
    assert not torch.equal(first[EMBEDDING][-1], first[HEAD][-1])


def test_through_megatron_weights_and_back(parts, tmp_path):
    tensors = assembled(parts, tmp_path / "hf")
    parts_of = dict(family="idefics2_llama3", llm=parts / "llm", vision=parts / "tower")
    hf2mg(None, tmp_path / "mg", **parts_of, assemble={"perceiver": PERCEIVER}, tp=2, pp=2)
    mg2hf(tmp_path / "mg", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items()) and back.keys() == tensors.keys()
    with open_source(tmp_path / "back", "idefics2_llama3") as source:
        assert source.spec.name == "idefics2_llama3"


@pytest.mark.parametrize(
    "llm, vision, message",
    [
        ("tower", "tower", "--llm .*model_type 'siglip_vision_model', not one of llama"),
        ("llm", "llm", "--vision .*model_type 'llama', not a SigLIP"),
    ],
)
def test_parts_of_another_architecture(parts, tmp_path, llm, vision, message):
    with pytest.raises(ConversionError, match=message):
        assembled(parts, tmp_path / "out", llm=llm, vision=vision)


def test_missing_and_unknown_tensors_are_named(parts, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(parts / "tower", changed)
    tensors = source_tensors(parts / "tower")
    del tensors["post_layernorm.bias"]
    save_file(tensors, changed / "model.safetensors")
    with pytest.raises(ConversionError, match=r"1 tensors missing .*model\.vision_model\.post_layernorm\.bias"):
        assembled(parts, tmp_path / "out", vision=changed)
    save_file(source_tensors(parts / "tower") | {"extra": torch.zeros(1)}, changed / "model.safetensors")
    with pytest.raises(ConversionError, match=r"1 tensors unknown .*extra"):
        assembled(parts, tmp_path / "out", vision=changed)


def test_options_that_cannot_be(parts, tmp_path):
    with pytest.raises(ConfigError, match="unknown perceiver option 'latents'"):
        assembled(parts, tmp_path / "out", perceiver={"latents": 3})
    with pytest.raises(ConfigError, match=r"unknown config key 'sed'.*'seed'"):
        assembled(parts, tmp_path / "out", sed=3)
    with pytest.raises(ConfigError, match="smaller than a patch"):
        assembled(parts, tmp_path / "out", image_size=4)
    with (
        pytest.raises(ConfigError, match="--family idefics2 or idefics2_llama3"),
        open_model(None, llm="a", vision="b"),
    ):
        pass
    with pytest.raises(ConfigError, match="both --llm DIR and --vision DIR"), open_model(None, llm="a"):
        pass


def with_end_of_utterance(directory, out, **options):
    with open_model(directory, end_of_utterance=True, assemble=options) as source:
        export_hf(source, out)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("tie", [False, True])
def test_base_variant_gets_its_token(tmp_path, tie):
    from transformers import AutoProcessor, Idefics2ForConditionalGeneration

    write_tiny_idefics2(tmp_path / "base", end_of_utterance=False, tie=tie)
    (tmp_path / "base" / "chat_template.jinja").unlink()
    before = load_file(tmp_path / "base" / "model.safetensors")
    rows = len(before[EMBEDDING])
    after = with_end_of_utterance(tmp_path / "base", tmp_path / "out")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        if name in (EMBEDDING, HEAD):
            assert torch.equal(after[name][:rows], tensor)
            assert after[name].shape[0] == rows + 1
            assert torch.allclose(after[name][rows], tensor.mean(0), atol=1e-6)
        else:
            assert torch.equal(after[name], tensor)
    model, info = Idefics2ForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and model.config.text_config.vocab_size == rows + 1
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>") == rows
    assert model.generation_config.eos_token_id == [2, rows]
    turns = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    assert processor.apply_chat_template(turns) == "User: a<end_of_utterance>\n"
    # Asked for again, nothing changes.
    again = with_end_of_utterance(tmp_path / "out", tmp_path / "again")
    assert all(torch.equal(again[name], tensor) for name, tensor in after.items())
