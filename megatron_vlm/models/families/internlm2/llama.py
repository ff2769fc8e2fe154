"""InternLM2 as Llama: the non-weight files of a folder that transformers loads natively.

Query, key and value apart, InternLM2 computes what Llama does, dynamic NTK included.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vlm.data.config import DataConfig
from megatron_vlm.models.assembling import Tensors, check_names, copy_licences, renamed
from megatron_vlm.models.families.internlm2.config import InternLM2ModelConfig, internlm2_text_config
from megatron_vlm.models.families.internlm2.mapping import internlm2_mapping, llama_mapping
from megatron_vlm.models.families.internlm2.processor import InternLM2Processor
from megatron_vlm.models.processing.processor_files import special_tokens
from megatron_vlm.models.processing.template_processor import write_tokenizer
from megatron_vlm.weights.mapping import HFModel


def write_llama_files(hf_dir: Path, hf_config: dict[str, Any], directory: Path) -> None:
    """Writes the files of LlamaForCausalLM: config, tokenizer with chat template, generation config, licence."""
    (directory / "config.json").write_text(json.dumps(llama_config(hf_config), indent=2) + "\n", encoding="utf-8")
    processor = InternLM2Processor.from_pretrained(hf_dir, DataConfig(seq_length=2))
    write_tokenizer(directory, processor, special_tokens(hf_dir))
    copy_licences(hf_dir, directory)


def llama_config(hf_config: dict[str, Any]) -> dict[str, Any]:
    """InternLM2's config.json as Llama's, in the spelling that old and new versions of transformers read."""
    text = internlm2_text_config(hf_config)
    scaling = text.rope_scaling
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.ffn_hidden_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_query_groups,
        "head_dim": text.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": text.max_position_embeddings,
        "rms_norm_eps": text.norm_epsilon,
        "rope_theta": text.rotary_base,
        "rope_scaling": scaling
        and {"type": scaling.rope_type, "rope_type": scaling.rope_type, "factor": scaling.factor},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": text.tie_word_embeddings,
        **{key: value for key, value in hf_config.items() if key in kept},
    }


def llama_tensors(llm: HFModel) -> Tensors:
    """Readers and infos of a language model's tensors by the names of Llama: InternLM2's taken apart, any other's as they are.

    Raises:
        ConversionError: tensors missing or unknown in an InternLM2.
    """
    stored = llm.tensors.infos
    if llm.config.get("model_type") != "internlm2":
        names = [name for name in stored if not name.endswith("rotary_emb.inv_freq")]
        return {name: partial(llm.tensors.read, name) for name in names}, {name: stored[name] for name in names}
    config = InternLM2ModelConfig.from_hf(llm.config)
    own, llama = internlm2_mapping(config), llama_mapping(config).by_name()
    found = stored.keys() - own.hf_tied.keys() - own.ignored
    check_names(own.hf_names(), found, f"--llm {llm.directory} is not InternLM2")
    return renamed(llm.tensors, own, llama)
