"""InternLM2 as Llama: the non-weight files of a folder that transformers loads natively.

Query, key and value apart, InternLM2 computes what Llama does, dynamic NTK included.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.data.chat import FastTokenizer
from megatron_vlm.data.config import DataConfig
from megatron_vlm.data.templates import Template
from megatron_vlm.models.internlm2.config import internlm2_text_config
from megatron_vlm.models.internlm2.processor import InternLM2Processor


def write_llama_files(hf_dir: Path, hf_config: dict[str, Any], directory: Path) -> None:
    """Writes the files of LlamaForCausalLM: config, tokenizer with chat template, generation config, licence."""
    (directory / "config.json").write_text(json.dumps(llama_config(hf_config), indent=2) + "\n", encoding="utf-8")
    processor = InternLM2Processor.from_pretrained(hf_dir, DataConfig(seq_length=2))
    write_tokenizer(directory, processor.tokenizer, processor.template)
    write_generation_config(directory, processor.bos_token_id, processor.stop_ids, processor.filler_token_id)
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
        "rope_scaling": scaling and {"type": scaling.kind, "rope_type": scaling.kind, "factor": scaling.factor},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": text.tie_word_embeddings,
        **{key: value for key, value in hf_config.items() if key in kept},
    }


def write_tokenizer(
    directory: Path, tokenizer: FastTokenizer, template: Template, added: Sequence[str] = (), bos: str = "<s>"
) -> Any:
    """Writes tokenizer.json and tokenizer_config.json, with the template as chat template, and returns the tokenizer.

    Args:
        directory: exists.
        tokenizer: adds nothing to a text; the written one puts BOS in front.
        template: of the prompts.
        added: special tokens to add.
        bos: text of BOS.
    """
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer.text)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.chat_template = template.jinja(bos, "</s>")
    fast.save_pretrained(directory)
    return fast


def write_generation_config(directory: Path, bos: int | None, stops: Sequence[int], pad: int) -> None:
    """Writes generation_config.json."""
    from transformers import GenerationConfig

    GenerationConfig(bos_token_id=bos, eos_token_id=list(stops), pad_token_id=pad).save_pretrained(directory)


def copy_licences(source: Path, directory: Path) -> None:
    """Copies licence and notice files."""
    for path in source.iterdir():
        if path.is_file() and path.name.upper().startswith(("LICENSE", "NOTICE", "USE_POLICY")):
            (directory / path.name).write_bytes(path.read_bytes())
