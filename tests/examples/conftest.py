"""Tiny twins of what the example scripts take: a Llama, a SigLIP tower, and data sets in LLaVA's format."""

import json
from pathlib import Path

import pytest

from megatron_vlm.testing.runs import write_shards
from megatron_vlm.testing.twins.common import randomise
from megatron_vlm.testing.twins.idefics2 import tiny_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def llm(tmp_path_factory) -> Path:
    """A Llama with a tokenizer as Llama 3 has: no image tokens, no padding token, reserved tokens."""
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    data = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < 3]
    backend = Tokenizer.from_str(json.dumps(data))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_special_token_0|>"]})
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=len(tokenizer), max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llm")
    randomise(LlamaForCausalLM(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vision(tmp_path_factory) -> Path:
    """A SigLIP tower with the real one's image and patch size."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=384, patch_size=14
    )
    folder = tmp_path_factory.mktemp("vision")
    randomise(SiglipVisionModel(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """``shards`` of 12 samples, beside the ``records.json`` and ``images`` they were built from."""
    return write_shards(tmp_path_factory.mktemp("data"), 12, seed=5).parent


@pytest.fixture(scope="session")
def val_data(tmp_path_factory) -> Path:
    """The same of 5 samples."""
    return write_shards(tmp_path_factory.mktemp("val_data"), 5, seed=6).parent
