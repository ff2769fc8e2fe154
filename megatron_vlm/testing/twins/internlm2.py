"""Tiny InternLM2 checkpoints: its own key names, its SentencePiece tokenizer, and the Llama that computes the same."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.data.row import EncodedSample
from megatron_vlm.testing.twins.common import CORPUS, randomise

CHAT_TOKENS = {"[UNUSED_TOKEN_145]": "<|im_end|>", "[UNUSED_TOKEN_146]": "<|im_start|>"}


def write_sentencepiece(directory: Path, vocab_size: int = 380, chat: bool = True, more: Sequence[str] = ()) -> int:
    """Writes a tokenizer.model trained on the corpus and its tokenizer_config.json; returns the number of tokens.

    As InternLM2's: no space before a text, ``<unk> <s> </s>`` first, bytes for what no piece covers. ``chat`` names the two
    unused tokens as the chat models do; ``more`` tokens follow the pieces.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()), model_writer=model, vocab_size=vocab_size, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=3,
        normalization_rule_name="identity", user_defined_symbols=list(CHAT_TOKENS), hard_vocab_limit=False,
    )  # fmt: skip
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    added = {str(pieces.piece_to_id(piece)): {"content": name} for piece, name in CHAT_TOKENS.items()} if chat else {}
    added |= {str(len(pieces) + number): {"content": name} for number, name in enumerate(more)}
    settings = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "added_tokens_decoder": added,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(pieces) + len(more)


def write_generation(directory: Path) -> None:
    """Writes generation_config.json as the published chat models have it: an answer ends at EOS and at the end of a turn."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=(directory / "tokenizer.model").read_bytes())
    ends = [2, pieces.piece_to_id("[UNUSED_TOKEN_145]")]
    content = {"bos_token_id": 1, "eos_token_id": ends, "pad_token_id": 2}
    (directory / "generation_config.json").write_text(json.dumps(content, indent=2) + "\n")


def fuse(state: dict[str, Tensor], num_query_groups: int) -> dict[str, Tensor]:
    """LlamaForCausalLM's state dict under InternLM2's names, query, key and value of each group in one ``wqkv``.

    Written from the published layout, not from the package's mapping, which it is to test.
    """
    names = {
        "model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
    }  # fmt: skip
    fused = {}
    for name, tensor in state.items():
        if ".q_proj" in name:
            groups = [state[name.replace("q_proj", f"{x}_proj")].unflatten(0, (num_query_groups, -1)) for x in "qkv"]
            fused[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(groups, 1).flatten(0, 1)
        elif ".k_proj" not in name and ".v_proj" not in name:
            for theirs, own in names.items():
                name = name.replace(theirs, own)
            fused[name] = tensor.clone()
    return fused


def write_tiny_internlm2(
    directory: str | Path,
    *,
    seed: int = 0,
    std: float = 0.15,
    chat: bool = True,
    dtype: torch.dtype = torch.float32,
    **options: Any,
):
    """Writes a whole InternLM2 checkpoint, with a file of code beside it that must never run; returns the Llama twin.

    ``options`` override single values of the Llama config: ``hidden_size``, ``num_hidden_layers`` ...; ``rope_scaling`` is
    written as InternLM2 writes it.
    """
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = Path(directory)
    vocab_size = write_sentencepiece(directory, chat=chat)
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": vocab_size, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, **options,
    }  # fmt: skip
    rope = {"rope_type": "default", **(sizes["rope_scaling"] or {}), "rope_theta": sizes["rope_theta"]}
    rope["rope_type"] = rope.pop("type", "default")
    llama = LlamaConfig(**{k: v for k, v in sizes.items() if not k.startswith("rope_")}, rope_parameters=rope)
    llama._attn_implementation = "eager"
    model: Any = randomise(LlamaForCausalLM(llama), seed, std).to(dtype).eval()
    state = dict(model.named_parameters())
    save_file(
        {name: tensor.detach() for name, tensor in fuse(state, sizes["num_key_value_heads"]).items()},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    config = {
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
        "model_type": "internlm2",
        "bias": False,
        "hidden_act": "silu",
        "torch_dtype": str(dtype).removeprefix("torch."),
        **sizes,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if chat:
        write_generation(directory)
    (directory / "modeling_internlm2.py").write_text("raise RuntimeError('the code of a model folder was run')\n")
    return model


def make_samples(vocab_size: int, lengths: Sequence[int], seed: int = 0) -> list[EncodedSample]:
    """Samples of random tokens, the first third of each without labels."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, vocab_size, (length,), generator=generator)
        labels = ids.clone()
        labels[: max(1, length // 3)] = -100
        samples.append(EncodedSample(key=f"sample{number}", input_ids=ids, labels=labels))
    return samples


def llama_inputs(sample: EncodedSample, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The Llama twin's arguments for one sample."""
    return {"input_ids": sample.input_ids[None]}
