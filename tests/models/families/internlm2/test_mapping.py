"""InternLM2's own key names in and out of every layout, and out as Llama. The code beside the weights raises when it is run."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.cli.convert import main
from megatron_vlm.conversion.convert import hf2mg, mg2hf
from megatron_vlm.conversion.open_source import open_source
from megatron_vlm.errors import ConfigError, ConversionError
from megatron_vlm.testing.twins.internlm2 import make_samples, write_tiny_internlm2


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    directory = tmp_path_factory.mktemp("internlm2")
    return directory, write_tiny_internlm2(directory, max_position_embeddings=64)


def assert_same_folder(left, right):
    a, b = (load_file(directory / "model.safetensors") for directory in (left, right))
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
    names = {path.name for path in left.iterdir()}
    assert names == {path.name for path in right.iterdir()}
    for name in names - {"model.safetensors"}:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_round_trip(twin, tmp_path, tp, pp):
    hf2mg(twin[0], tmp_path / "mg", tp=tp, pp=pp)
    mg2hf(tmp_path / "mg", tmp_path / "hf")
    assert (tmp_path / "hf" / "modeling_internlm2.py").exists() and (tmp_path / "hf" / "tokenizer.model").exists()
    assert_same_folder(twin[0], tmp_path / "hf")


def test_as_llama(twin, tmp_path, caplog):
    """transformers loads it in silence, and it is the Llama that the twin was fused from, beyond trained positions too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    directory, llama = twin
    hf2mg(directory, tmp_path / "mg", tp=2, pp=2)
    assert main(["mg2hf", "--load", str(tmp_path / "mg"), "--out", str(tmp_path / "llama"), "--as", "llama"]) == 0
    hf_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        model, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "llama", attn_implementation="eager", output_loading_info=True
        )
    hf_logging.disable_propagation()
    assert type(model).__name__ == "LlamaForCausalLM" and not any(info.values()) and not caplog.records
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), llama.parameters(), strict=True))
    for sample in make_samples(llama.config.vocab_size, [20, 100]):
        with torch.no_grad():
            assert torch.equal(model(sample.input_ids[None]).logits, llama(sample.input_ids[None]).logits)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    turns = [{"role": "user", "content": "How many cats?"}]
    text = "<|im_start|>user\nHow many cats?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == text
    from megatron_vlm.data.config import DataConfig
    from megatron_vlm.data.sample import Turn

    with open_source(directory) as source:
        processor = source.spec.processor(directory, DataConfig(seq_length=64))
    ours = processor.encode_prompt([Turn(role="user", text="How many cats?")], [])
    assert tokenizer(text)["input_ids"] == ours.input_ids.tolist()
    generation = json.loads((tmp_path / "llama" / "generation_config.json").read_text())
    assert sorted(generation["eos_token_id"]) == sorted(processor.stop_ids)


def test_as_llama_from_an_hf_folder_in_another_dtype(twin, tmp_path):
    mg2hf(twin[0], tmp_path / "llama", dtype="bf16", naming="llama")
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "llama" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_tied_head_stays_tied(tmp_path):
    (tmp_path / "a").mkdir()
    llama = write_tiny_internlm2(tmp_path / "a", tie_word_embeddings=True)
    hf2mg(tmp_path / "a", tmp_path / "mg", tp=2)
    mg2hf(tmp_path / "mg", tmp_path / "b")
    assert_same_folder(tmp_path / "a", tmp_path / "b")
    mg2hf(tmp_path / "mg", tmp_path / "llama", naming="llama")
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, llama.lm_head.weight)


def test_another_layout_than_the_family_has(twin, tmp_path):
    with pytest.raises(ConfigError, match=r"--as lama .did you mean 'llama'.*family internlm2 offers llama"):
        mg2hf(twin[0], tmp_path / "out", naming="lama")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(bias=True), "bias true is not built"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (dict(rms_norm_eps=None), "lacks rms_norm_eps"),
        (
            dict(rope_scaling={"type": "yarn", "factor": 2.0}),
            "rope_type 'yarn' is none that InternLM2's own code reads",
        ),
    ],
)
def test_configs_that_are_not_built(twin, tmp_path, change, message):
    config = json.loads((twin[0] / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not None or key == "rope_scaling"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        open_source(tmp_path)


def test_missing_tensors_are_named(twin, tmp_path):
    for path in twin[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.attention.wqkv.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"1 tensors missing: model\.layers\.1\.attention\.wqkv\.weight"):
        open_source(tmp_path)
